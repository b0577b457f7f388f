"""Typed, validated configuration: the settings of every group, and `validate`, which reports all problems at once."""

from __future__ import annotations

from lightning_hybrid.config.algorithm import OptimizerConfig, PPOConfig, RewardConfig, SFTConfig
from lightning_hybrid.config.data import DataConfig, InstructionDataConfig, PreferenceDataConfig, PromptDataConfig
from lightning_hybrid.config.groups import (
    CallbacksConfig,
    CheckpointConfig,
    HybridEngineConfig,
    LoggerConfig,
    ModelConfig,
    PPOModelConfig,
    RewardSourceConfig,
    RolloutConfig,
    SleepConfig,
    StrategyConfig,
    TrainerConfig,
)
from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.config.roots import PPORun, QuickstartRun, RewardRun, Run, SFTRun, StageOverrides
from lightning_hybrid.config.validate import validate
from lightning_hybrid.settings import Settings

__all__ = [
    "CallbacksConfig",
    "CheckpointConfig",
    "DataConfig",
    "HybridEngineConfig",
    "InstructionDataConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOModelConfig",
    "PPORun",
    "PlanRun",
    "PreferenceDataConfig",
    "PromptDataConfig",
    "QuickstartRun",
    "RewardConfig",
    "RewardRun",
    "RewardSourceConfig",
    "RolloutConfig",
    "Run",
    "SFTConfig",
    "SFTRun",
    "Settings",
    "SleepConfig",
    "StageOverrides",
    "StrategyConfig",
    "TrainerConfig",
    "validate",
]
