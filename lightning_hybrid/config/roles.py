"""Settings of each model of the recipe `ppo` that differ from those of the run."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt

from lightning_hybrid.algorithms.optimizer import BelowOne
from lightning_hybrid.settings import Problem, Rule, Settings


def _one_process_shares_with_no_rank(config: FrozenRoleConfig) -> Problem | None:
    if not config.separate or config.zero_stage is None:
        return None
    remedy = "is about copies in the ranks, and separate=true has none there: leave it out"
    return Problem("zero_stage", remedy, str(config.zero_stage))


def _device_is_of_a_process(config: FrozenRoleConfig) -> Problem | None:
    if config.separate or config.device is None:
        return None
    return Problem("device", "is that of a process of its own: set separate=true, or leave it out", str(config.device))


class FrozenRoleConfig(Settings):
    """A model that is not trained."""

    rules: ClassVar[tuple[Rule, ...]] = (_one_process_shares_with_no_rank, _device_is_of_a_process)

    zero_stage: Literal[0, 3] | None = None
    """0: a copy on every rank; 3: shared between the ranks; null: as the strategy does"""
    separate: bool = False
    """in a process of its own that the ranks ask, so that none of them holds a copy"""
    device: NonNegativeInt | None = None
    """CUDA index of that process, of those that the first rank sees; null: the CPU"""


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
