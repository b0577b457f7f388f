"""Settings of learning from examples; those of learning from rollouts are in `lightning_hybrid.algorithms`."""

from __future__ import annotations

from lightning_hybrid.algorithms.optimizer import OptimizerConfig

__all__ = ["OptimizerConfig", "RewardConfig", "SFTConfig"]


class SFTConfig(OptimizerConfig):
    """Supervised fine-tuning: next-token loss on responses only."""


class RewardConfig(OptimizerConfig):
    """Reward modelling: the Bradley-Terry preference loss (Ouyang et al. 2022, eq. 1)."""
