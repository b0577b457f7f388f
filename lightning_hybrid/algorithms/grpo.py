"""Group relative policy optimization."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat

from lightning_hybrid.algorithms.group import GroupConfig
from lightning_hybrid.algorithms.optimizer import Aggregation


class GRPOConfig(GroupConfig):
    """Group relative policy optimization (Shao et al. 2024, "DeepSeekMath", equations 3 and 4)."""

    name: str = "grpo"
    """which algorithm this is"""
    kl_coef: NonNegativeFloat = 0.04
    """weight of the KL penalty"""
    kl_placement: Literal["reward", "loss"] = "loss"
    """where the KL is charged: reward (k1, off the reward of each token), loss (kl_estimator, as a term of its own)"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """estimator of the KL that is logged, that kl_target refers to, and of a KL loss (Schulman 2020)"""
    aggregation: Aggregation = "seq_mean_token_mean"
    """how token losses become one number"""
