"""Group sequence policy optimization."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from lightning_hybrid.algorithms.grpo import GRPOConfig
from lightning_hybrid.algorithms.optimizer import OpenUnit


class GSPOConfig(GRPOConfig):
    """GRPO whose ratios are those of whole responses, per token (Zheng et al. 2025, equations 5 and 7)."""

    name: str = "gspo"
    """which algorithm this is"""
    reference: bool = False
    """keep the policy as it starts, frozen, to charge the KL to it, or to log it; without, kl_coef must be 0"""
    kl_coef: NonNegativeFloat = 0.0
    """weight of the KL penalty"""
    clip_low: OpenUnit = 3e-4
    """the ratio of a response is clipped below at 1 - clip_low"""
    clip_high: PositiveFloat = 4e-4
    """the ratio of a response is clipped above at 1 + clip_high"""

    def policy_loss(self, logprobs: Tensor, old_logprobs: Tensor, **terms: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped ratios of responses."""
        return super().policy_loss(logprobs, old_logprobs, level="sequence", **terms)
