"""Clipped importance-sampling policy optimization."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from lightning_hybrid.algorithms.grpo import GRPOConfig
from lightning_hybrid.algorithms.optimizer import Aggregation
from lightning_hybrid.rl import cispo_loss


class CISPOConfig(GRPOConfig):
    """GRPO's advantages under clipped importance weights, so that no token loses its gradient (MiniMax 2025)."""

    name: str = "cispo"
    """which algorithm this is"""
    reference: bool = False
    """keep the policy as it starts, frozen, to charge the KL to it, or to log it; without, kl_coef must be 0"""
    kl_coef: NonNegativeFloat = 0.0
    """weight of the KL penalty"""
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """the importance weight is clipped below at 1 - clip_low; 1 for no limit"""
    clip_high: PositiveFloat = 4.0
    """the importance weight is clipped above at 1 + clip_high"""
    aggregation: Aggregation = "token_mean"
    """how token losses become one number"""

    def policy_loss(self, logprobs: Tensor, old_logprobs: Tensor, **terms: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs under clipped importance weights."""
        return cispo_loss(
            logprobs,
            old_logprobs,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            aggregation=self.aggregation,
            **terms,
        )
