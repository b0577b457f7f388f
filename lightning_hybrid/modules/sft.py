"""Supervised fine-tuning on responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lightning_hybrid.config import SFTConfig
from lightning_hybrid.models import Policy, load_policy, max_positions
from lightning_hybrid.models.packing import refuse_unpackable
from lightning_hybrid.modules.likelihood import next_token_loss
from lightning_hybrid.modules.means import over_ranks, rows_that_count
from lightning_hybrid.modules.optimization import adamw_with_schedule


class SFTModule(L.LightningModule):
    """Next-token cross-entropy, averaged over the tokens that count (responses and their EOS) of all ranks.

    With ``accumulate_grad_batches``, each accumulated batch weighs the same, as everywhere in Lightning.

    Args:
        policy: a :class:`~lightning_hybrid.models.Policy`, or the path or hub name of a causal LM.
        config: learning rate and schedule.
    """

    def __init__(self, policy: Policy | str | Path, config: SFTConfig | None = None) -> None:
        super().__init__()
        self.policy = policy if isinstance(policy, Policy) else load_policy(policy)
        self.policy.train()  # from_pretrained leaves dropout off
        self.config = config or SFTConfig()

    @property
    def max_positions(self) -> int | None:
        """Tokens that a text may have; None for no limit."""
        return max_positions(self.policy.config)

    def setup(self, stage: str) -> None:
        """Refuse packed texts where the model would let one see another.

        Raises:
            ConfigError: names what it is about the model.
        """
        if getattr(getattr(self.trainer, "datamodule", None), "packing", False):
            refuse_unpackable(self.policy)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of instructions, see :class:`~lightning_hybrid.data.InstructionDataModule`."""
        total, count = next_token_loss(self.policy, batch)
        # Engines average gradients over ranks: each rank's sum is divided by the mean count, which weighs tokens alike.
        mean_count = self.trainer.strategy.reduce(count.float(), reduce_op="mean")
        loss = total / mean_count.clamp_min(1)
        self.log("loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val/loss``, in nats per token of all texts of all ranks."""
        loss_mask = batch["loss_mask"].clone()
        loss_mask[rows_that_count(self.trainer, batch_idx, len(loss_mask)) :] = False
        total, count = next_token_loss(self.policy, batch | {"loss_mask": loss_mask})
        means, tokens = over_ranks(self.trainer, {"val/loss": total / count}, int(count))
        self.log_dict(means, batch_size=tokens, sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule that steps with the optimizer."""
        return adamw_with_schedule(self.trainer, self.policy.parameters(), self.config)
