"""Decoupled clip and dynamic sampling policy optimization."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat

from lightning_hybrid.algorithms.grpo import GRPOConfig
from lightning_hybrid.algorithms.optimizer import Aggregation


class DAPOConfig(GRPOConfig):
    """GRPO with a higher upper clip, token-level loss and no KL (Yu et al. 2025, "DAPO").

    Its other two parts want a number of yours: ``groups`` (dynamic sampling) and ``overlong_buffer`` (soft overlong
    punishment).
    """

    name: str = "dapo"
    """which algorithm this is"""
    reference: bool = False
    """keep the policy as it starts, frozen, to charge the KL to it, or to log it; without, kl_coef must be 0"""
    kl_coef: NonNegativeFloat = 0.0
    """weight of the KL penalty"""
    clip_high: PositiveFloat = 0.28
    """the policy ratio is clipped above at 1 + clip_high"""
    aggregation: Aggregation = "token_mean"
    """how token losses become one number"""
