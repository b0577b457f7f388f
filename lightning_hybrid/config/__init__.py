"""Typed, validated configuration: the settings of every group, and `validate`, which reports all problems at once."""

from __future__ import annotations

from lightning_hybrid.algorithms import (
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    OnlineConfig,
    PPOConfig,
    ReinforcePlusPlusBaselineConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
)
from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.config.algorithm import OptimizerConfig, RewardConfig, SFTConfig
from lightning_hybrid.config.data import (
    DataConfig,
    InstructionDataConfig,
    PreferenceDataConfig,
    PromptDataConfig,
    UnpairedDataConfig,
)
from lightning_hybrid.config.evaluation import EvaluationConfig
from lightning_hybrid.config.groups import (
    CallbacksConfig,
    CheckpointConfig,
    HybridEngineConfig,
    LoggerConfig,
    ModelConfig,
    PPOModelConfig,
    RolloutConfig,
    SleepConfig,
    StrategyConfig,
    TrainerConfig,
)
from lightning_hybrid.config.launcher import LauncherConfig
from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.config.ppo import PPORun, PTXConfig
from lightning_hybrid.config.preference import DPOConfig, DPORun, KTOConfig, KTORun, PreferenceModelConfig
from lightning_hybrid.config.reward import ClassifierConfig, RewardSourceConfig, RewardTermConfig, WeightedTermConfig
from lightning_hybrid.config.roles import FrozenRoleConfig, RolesConfig, TrainedRoleConfig
from lightning_hybrid.config.roots import QuickstartRun, RewardRun, Run, SFTRun, StageOverrides
from lightning_hybrid.config.sweep import SweepConfig
from lightning_hybrid.config.validate import validate
from lightning_hybrid.config.vllm import VLLMConfig
from lightning_hybrid.settings import Settings

__all__ = [
    "AdapterConfig",
    "CISPOConfig",
    "CallbacksConfig",
    "CheckpointConfig",
    "ClassifierConfig",
    "DAPOConfig",
    "DPOConfig",
    "DPORun",
    "DataConfig",
    "DrGRPOConfig",
    "EvaluationConfig",
    "FrozenRoleConfig",
    "GRPOConfig",
    "GSPOConfig",
    "HybridEngineConfig",
    "InstructionDataConfig",
    "KTOConfig",
    "KTORun",
    "LauncherConfig",
    "LoggerConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOModelConfig",
    "PPORun",
    "PTXConfig",
    "PlanRun",
    "PreferenceDataConfig",
    "PreferenceModelConfig",
    "PromptDataConfig",
    "QuickstartRun",
    "RLOOConfig",
    "ReinforcePlusPlusBaselineConfig",
    "ReinforcePlusPlusConfig",
    "RewardConfig",
    "RewardRun",
    "RewardSourceConfig",
    "RewardTermConfig",
    "RolesConfig",
    "RolloutConfig",
    "Run",
    "SFTConfig",
    "SFTRun",
    "Settings",
    "SleepConfig",
    "StageOverrides",
    "StrategyConfig",
    "SweepConfig",
    "TrainedRoleConfig",
    "TrainerConfig",
    "UnpairedDataConfig",
    "VLLMConfig",
    "WeightedTermConfig",
    "validate",
]
