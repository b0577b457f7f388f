"""Settings of the memory plan: those of PPO, of which fewer must be given, and what the plan is held against."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from lightning_hybrid.config.data import PromptDataConfig
from lightning_hybrid.config.groups import (
    ModelConfig,
    PPOModelConfig,
    adapter_needs_weights,
    architecture_needs_tokenizer,
)
from lightning_hybrid.config.ppo import PPORun
from lightning_hybrid.config.reward import RewardSourceConfig, one_reward_source, sources_of
from lightning_hybrid.settings import Problem, Rule


def _architecture_knows_its_vocabulary(config: PlannedModelConfig) -> Problem | None:
    if config.architecture is None or "vocab_size" in config.architecture:
        return None
    given = f"keys {sorted(config.architecture)}"
    return Problem("architecture", "must have vocab_size: a plan reads no tokenizer", given)


def _at_most_one_source(config: PlannedRewardConfig) -> Problem | None:
    return one_reward_source(config) if sources_of(config) or config.terms else None


class PlannedModelConfig(PPOModelConfig):
    """The models of PPO, of which a plan reads the configurations only."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *(rule for rule in ModelConfig.rules if rule not in (architecture_needs_tokenizer, adapter_needs_weights)),
        _architecture_knows_its_vocabulary,
    )


class PlannedRewardConfig(RewardSourceConfig):
    """Where scores come from; nothing stands for a function, which takes no memory of the device."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *(rule for rule in RewardSourceConfig.rules if rule is not one_reward_source),
        _at_most_one_source,
    )


class PlanRun(PPORun):
    """Configuration of the recipe `plan`: that of a PPO run, and the memory it should fit in."""

    model: PlannedModelConfig
    """the policy, and the models beside it"""
    reward: PlannedRewardConfig = Field(default_factory=PlannedRewardConfig)
    """where scores come from"""
    data: PromptDataConfig = Field(default_factory=lambda: PromptDataConfig(path="unread"))
    """prompts: their file is not read"""
    device_memory_gib: PositiveFloat | None = None
    """memory of one device; null for what this machine's device has (a CPU: its memory, shared between its ranks)"""
    prompt_tokens: PositiveInt | None = None
    """tokens of the longest prompt; null for as many as the settings allow"""
