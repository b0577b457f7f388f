"""Errors of the project. Each message names the problem, the value, where it is, and the fix."""

from __future__ import annotations

from http import HTTPStatus


class LightningHybridError(Exception):
    """Base of every error raised on purpose by lightning-hybrid.

    Attributes:
        on_every_rank: whether all ranks raise it together, so that they can still act together, such as to save.
    """

    on_every_rank = False


class ConfigError(LightningHybridError, ValueError):
    """A configuration that cannot run, found before any training."""


class DataError(LightningHybridError, ValueError):
    """A data file, row or tokenizer that cannot be used, found before any training."""


class RewardError(LightningHybridError, RuntimeError):
    """A reward that raised, or did not give one finite number per response."""


class RolloutError(LightningHybridError, RuntimeError):
    """A generation request that cannot be honoured."""


class ServerError(LightningHybridError, RuntimeError):
    """A call that a server of a role did not answer, or refused.

    Attributes:
        status: of its answer; None where there was none: the process ended, hangs, or cannot be reached.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def refused(self) -> bool:
        """Whether it would be answered in the same way again, by any server of the same role."""
        return self.status == HTTPStatus.BAD_REQUEST


class StrategyError(LightningHybridError, RuntimeError):
    """A module, optimizer or device layout that the strategy cannot turn into engines."""


class CheckpointError(LightningHybridError, RuntimeError):
    """A checkpoint that cannot be written, or is not what was written."""


class RankLostError(LightningHybridError, RuntimeError):
    """Another rank died, stopped or hangs; the message names it, and what it last said."""


class MemoryExhaustedError(LightningHybridError, RuntimeError):
    """Out of memory; the message names the phase, who holds how much, and the setting that helps."""


class NonFiniteError(LightningHybridError, RuntimeError):
    """Loss or gradients were not finite for too many steps in a row."""
