"""What preference optimisation without rollouts has in common: a policy, its reference, losses of rows, figures."""

from __future__ import annotations

import copy
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from lightning_hybrid.config import DPOConfig, KTOConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy, disable_dropout, load_policy, max_positions
from lightning_hybrid.models.adapters import AdaptersOff, has_adapter
from lightning_hybrid.modules.means import Means, rows_that_count
from lightning_hybrid.modules.optimization import adamw_with_schedule
from lightning_hybrid.strategy import EngineSpec

ON_THE_BAR = ("loss", "rewards/accuracy")


class PreferenceModule(L.LightningModule):
    """Train a policy on rows that each have a loss of their own, against a frozen reference; no rollouts.

    The loss is the mean over the rows of all ranks. With ``accumulate_grad_batches``, each accumulated batch weighs the
    same, as everywhere in Lightning. Figures are means over all rows of one optimizer step, or of one validation, on
    all ranks, however they were cut into batches. Neither model has dropout.

    Args:
        policy: a :class:`~lightning_hybrid.models.Policy`, or the path or hub name of a causal LM.
        reference: the same; None for the policy as given: a copy of it, or the policy with its adapters off.
        config: of the algorithm.
        needs_reference: keep a reference at all.

    Raises:
        ConfigError: if the reference does not read the policy's tokens.
    """

    figures: ClassVar[tuple[str, ...]] = ()
    """what is logged, and under ``val/`` in validation"""

    def __init__(
        self,
        policy: Policy | str | Path,
        reference: Policy | str | Path | None,
        config: DPOConfig | KTOConfig,
        *,
        needs_reference: bool = True,
    ) -> None:
        super().__init__()
        chunk = config.logprob_chunk
        self.policy = policy if isinstance(policy, Policy) else load_policy(policy, chunk)
        self.policy.train()
        disable_dropout(self.policy)
        self.reference = _make_reference(self.policy, reference, chunk) if needs_reference else None
        self._step_means, self._validation_means = Means(self.figures), Means(self.figures)
        self._step_begun = -1
        self._optimizer_config = config

    @property
    def max_positions(self) -> int | None:
        """Tokens that a text may have; None for no limit."""
        return max_positions(self.policy.config)

    @abstractmethod
    def _judge(self, batch: dict[str, Any], count: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of the batch's rows, Float[B], and each figure for those of its first ``count`` rows that have it."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        losses, figures = self._judge(batch)
        if self._step_begun != self.trainer.global_step:
            self._step_means.clear()
            self._step_begun = self.trainer.global_step
        self._step_means.add(self._sum_over_ranks(self._step_means.pack({"loss": losses, **figures})))
        self._show(self._step_means.means())
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        # Engines average gradients over ranks: each rank's sum is divided by the mean count, which weighs rows alike.
        mean_count = self.trainer.strategy.reduce(losses.new_tensor(float(len(losses))), reduce_op="mean")
        return losses.sum() / mean_count

    def on_validation_epoch_start(self) -> None:
        """Begin new means."""
        self._validation_means.clear()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Take one batch into the means of the validation."""
        rows = len(batch.get("chosen", batch)["input_ids"])
        count = rows_that_count(self.trainer, batch_idx, rows)
        losses, figures = self._judge(batch, count)
        self._validation_means.add(self._validation_means.pack({"loss": losses[:count], **figures}))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks, as ``val/loss`` and so on."""
        own = self._validation_means.packed
        if own is not None:
            self._validation_means.clear()
            self._validation_means.add(self._sum_over_ranks(own))
        self._show(self._validation_means.means(), "val/")

    def _show(self, means: dict[str, float], prefix: str = "") -> None:
        for name, value in means.items():
            # The same on all ranks already; Lightning warns where it does not average validations itself.
            self.log(f"{prefix}{name}", value, prog_bar=name in ON_THE_BAR, sync_dist=prefix != "")

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        reduced: Tensor = self.trainer.strategy.reduce(x.clone(), reduce_op="sum")
        return reduced

    def configure_engines(self) -> dict[str, EngineSpec]:
        """An evaluation engine for the reference, where it is a model of its own."""
        return {"reference": EngineSpec("frozen")} if isinstance(self.reference, torch.nn.Module) else {}

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule that steps with the optimizer."""
        return adamw_with_schedule(self.trainer, self.policy.parameters(), self._optimizer_config)


def _make_reference(policy: Policy, source: Policy | str | Path | None, chunk: int) -> Policy | AdaptersOff:
    """What was given; else the policy as it starts."""
    if source is None and has_adapter(policy):
        return AdaptersOff(policy)
    if source is None:
        return copy.deepcopy(policy).requires_grad_(False).eval()
    reference = source if isinstance(source, Policy) else load_policy(source, chunk)
    mine, others = (model.config.get_text_config().vocab_size for model in (policy, reference))
    if others < mine:
        raise ConfigError(
            f"the reference has {others:,} tokens and the policy {mine:,}: it cannot score the policy's texts; give a "
            "reference with the policy's tokenizer, or none for the policy as it starts"
        )
    disable_dropout(reference)
    return reference.requires_grad_(False).eval()
