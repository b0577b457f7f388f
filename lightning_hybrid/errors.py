"""Errors of the project. Each message names the problem, the value, where it is, and the fix."""

from __future__ import annotations


class LightningHybridError(Exception):
    """Base of every error raised on purpose by lightning-hybrid."""


class ConfigError(LightningHybridError, ValueError):
    """A configuration that cannot run, found before any training."""


class DataError(LightningHybridError, ValueError):
    """A data file, row or tokenizer that cannot be used, found before any training."""


class RewardError(LightningHybridError, RuntimeError):
    """A reward that raised, or did not give one finite number per response."""


class RolloutError(LightningHybridError, RuntimeError):
    """A generation request that cannot be honoured."""


class StrategyError(LightningHybridError, RuntimeError):
    """A module, optimizer or device layout that the strategy cannot turn into engines."""
