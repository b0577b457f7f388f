"""GRPO without its two biases."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeFloat

from lightning_hybrid.algorithms.grpo import GRPOConfig
from lightning_hybrid.algorithms.optimizer import Aggregation


class DrGRPOConfig(GRPOConfig):
    """GRPO that divides neither by a group's deviation nor by a response's length (Liu et al. 2025, "Dr. GRPO")."""

    kind: ClassVar[str] = "dr_grpo"

    name: str = "dr_grpo"
    """which algorithm this is"""
    reference: bool = False
    """keep the policy as it starts, frozen, to charge the KL to it, or to log it; without, kl_coef must be 0"""
    kl_coef: NonNegativeFloat = 0.0
    """weight of the KL penalty"""
    aggregation: Aggregation = "seq_mean_token_sum_norm"
    """how token losses become one number"""
