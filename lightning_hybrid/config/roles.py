"""Settings of each model of the recipe `ppo` that differ from those of the run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lightning_hybrid.algorithms.optimizer import BelowOne
from lightning_hybrid.settings import Settings


class FrozenRoleConfig(Settings):
    """A model that is not trained."""

    zero_stage: Literal[0, 3] | None = None
    """0: a copy on every rank; 3: shared between the ranks; null: as the strategy does"""


class TrainedRoleConfig(Settings):
    """A model that is trained."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage of its engine; null for the strategy's"""
    dropout: BelowOne = 0.0
    """of its layers while it trains; above 0, a policy differs from itself and ratios are not 1 to begin with"""
    gradient_checkpointing: bool = False
    """compute activations twice instead of keeping them"""


class RolesConfig(Settings):
    """What differs between the models of a run."""

    actor: TrainedRoleConfig = Field(default_factory=TrainedRoleConfig)
    """the policy"""
    critic: TrainedRoleConfig = Field(default_factory=TrainedRoleConfig)
    """the critic, where the algorithm has one"""
    reference: FrozenRoleConfig = Field(default_factory=FrozenRoleConfig)
    """the frozen reference policy"""
    reward: FrozenRoleConfig = Field(default_factory=FrozenRoleConfig)
    """reward models"""
