"""Direct preference optimization, and its relatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_hybrid.config import DPOConfig
from lightning_hybrid.models import Policy
from lightning_hybrid.modules.preference import PreferenceModule
from lightning_hybrid.modules.sequences import Texts
from lightning_hybrid.rl import preference_optimization_loss


class DPOModule(PreferenceModule):
    """A policy learns from pairs which response to prefer, without sampling any (Rafailov et al. 2023).

    Batches are those of :class:`~lightning_hybrid.data.PreferenceDataModule`. Both sides of all pairs go through the
    policy in one forward pass, and through the reference in another. The figures of pairs: ``loss``; the implicit
    rewards ``beta * (policy - reference)`` as ``rewards/chosen`` and ``rewards/rejected``; ``rewards/margin``, by how
    much the first leads; ``rewards/accuracy``, the share of pairs in which it leads (ties count half); ``logps/chosen``
    and ``logps/rejected``, log-probs of whole responses in nats; ``sft_loss``, nats per token of chosen responses.

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
        "rewards/margin",
        "rewards/accuracy",
        "logps/chosen",
        "logps/rejected",
        "sft_loss",
    )

    def __init__(
        self,
        policy: Policy | str | Path,
        reference: Policy | str | Path | None = None,
        config: DPOConfig | None = None,
    ) -> None:
        self.config = config or DPOConfig()
        super().__init__(policy, reference, self.config, needs_reference=not self.config.reference_free)

    def _judge(self, batch: dict[str, Any], count: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        chosen_texts = Texts.of(batch["chosen"])
        texts = chosen_texts.above(Texts.of(batch["rejected"]))
        ref_chosen, ref_rejected = self._reference_logprobs(texts).chunk(2)
        chosen, rejected = texts.logprobs(self.policy).chunk(2)
        losses, reward_chosen, reward_rejected = preference_optimization_loss(
            chosen, rejected, ref_chosen, ref_rejected, config.beta, config.kind, config.label_smoothing
        )
        sft = -chosen / chosen_texts.loss_mask.sum(1).clamp(min=1)
        lead = reward_chosen - reward_rejected
        figures = {
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/margin": lead,
            "rewards/accuracy": lead.sign() / 2 + 0.5,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "sft_loss": sft,
        }
        return losses + config.sft_coef * sft, {name: figure[:count] for name, figure in figures.items()}

    def _reference_logprobs(self, texts: Texts) -> Tensor:
        """Before the policy's own pass: with adapters both are one model, whose backward pass follows its last one."""
        if self.reference is None:
            return torch.zeros(len(texts.input_ids), device=texts.input_ids.device)
        with torch.no_grad():
            return texts.logprobs(self.reference)
