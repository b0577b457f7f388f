"""Kahneman–Tversky optimization."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hybrid.config import KTOConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy
from lightning_hybrid.modules.preference import PreferenceModule
from lightning_hybrid.modules.sequences import Texts, mismatched
from lightning_hybrid.rl import kto_baseline, kto_loss


class KTOModule(PreferenceModule):
    """A policy learns from responses that are good or bad, without pairs and without sampling (Ethayarajh et al. 2024).

    Batches are those of :class:`~lightning_hybrid.data.UnpairedDataModule`. The baseline z0 is estimated in each batch
    from prompts with the response of the row below (the last one with the first row's), over all ranks: batches need
    two rows or more on each rank. A single row, as the last batch of an epoch may be, adds nothing to it.

    The figures of rows: ``loss``; the implicit rewards ``beta * (policy - reference)`` of good and bad responses as
    ``rewards/chosen`` and ``rewards/rejected``, and the difference of the two as ``rewards/margin``;
    ``rewards/accuracy``, the share of rows on the right side of the baseline (ties count half); ``logps/chosen`` and
    ``logps/rejected``, log-probs of whole responses in nats; ``kl``, the baseline, in nats.

    Args:
        policy: a :class:`~lightning_hybrid.models.Policy`, or the path or hub name of a causal LM.
        reference: the same, frozen; None for the policy as given (with adapters: the policy with its adapters off).
        config: of the loss and the optimizer.

    Raises:
        ConfigError: if the reference does not read the policy's tokens.
    """

    figures: ClassVar[tuple[str, ...]] = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracy",
        "logps/chosen",
        "logps/rejected",
        "kl",
    )

    def __init__(
        self,
        policy: Policy | str | Path,
        reference: Policy | str | Path | None = None,
        config: KTOConfig | None = None,
    ) -> None:
        self.config = config or KTOConfig()
        super().__init__(policy, reference, self.config)

    def on_train_start(self) -> None:
        """Refuse batches of one row.

        Raises:
            ConfigError: with the remedy.
        """
        if getattr(self.trainer.train_dataloader, "batch_size", None) == 1:
            raise ConfigError(
                "KTO compares the rows of a batch with each other's responses, and batches have one row: set "
                "data.batch_size (batch_size of the data module) to 2 or more on each rank"
            )

    def _judge(self, batch: dict[str, Any], count: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        config, desirable = self.config, batch["desirable"]
        texts = Texts.of(batch)
        reference, baseline = self._reference_logprobs_and_baseline(texts, count)
        policy = texts.logprobs(self.policy)
        losses, rewards = kto_loss(
            policy,
            reference,
            desirable,
            baseline,
            config.beta,
            config.desirable_weight,
            config.undesirable_weight,
        )
        lead = torch.where(desirable, 1, -1) * (rewards - config.beta * baseline)
        good, rewards, logps = desirable[:count], rewards[:count], policy[:count]
        figures = {
            "rewards/chosen": rewards[good],
            "rewards/rejected": rewards[~good],
            "rewards/accuracy": lead[:count].sign() / 2 + 0.5,
            "logps/chosen": logps[good],
            "logps/rejected": logps[~good],
            "kl": baseline.expand(len(good)),
        }
        return losses, figures

    @torch.no_grad()
    def _reference_logprobs_and_baseline(self, texts: Texts, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Float[B], and 0-dim of the first rows. Both before the policy's own pass, as its backward pass follows it."""
        assert self.reference is not None
        others = mismatched(texts, self.max_positions)
        reference, ref_others = texts.above(others).logprobs(self.reference).chunk(2)
        # All ranks run the policy, also one whose single row tells nothing.
        policy_others = others.logprobs(self.policy)
        tell = (others.loss_mask.any(1) & (len(texts.input_ids) > 1))[:count]
        return reference, kto_baseline(policy_others[:count][tell], ref_others[:count][tell], self._sum_over_ranks)

    def _show(self, means: dict[str, float], prefix: str = "") -> None:
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means = means | {"rewards/margin": means["rewards/chosen"] - means["rewards/rejected"]}
        super()._show(means, prefix)
