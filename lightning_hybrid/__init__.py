"""RLHF inside PyTorch Lightning with one set of weights: the engine that trains the policy generates with it.

Importing the package registers the strategies ``hybrid_deepspeed`` and ``hybrid_deepspeed_stage_*``. Everything else is
imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hybrid.errors import LightningHybridError
from lightning_hybrid.strategy import EngineSpec, HybridDeepSpeedStrategy, register_strategies

if TYPE_CHECKING:
    from lightning_hybrid.algorithms import (
        CISPOConfig,
        DAPOConfig,
        DrGRPOConfig,
        GRPOConfig,
        GSPOConfig,
        PPOConfig,
        ReinforcePlusPlusBaselineConfig,
        ReinforcePlusPlusConfig,
        RLOOConfig,
    )
    from lightning_hybrid.config import DPOConfig, KTOConfig, RewardConfig, RolloutConfig, SFTConfig
    from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule, PromptDataModule
    from lightning_hybrid.generation import Rollout, SamplingParams, generate
    from lightning_hybrid.modules import DPOModule, KTOModule, PPOModule, RewardModule, SFTModule

register_strategies()

__version__ = "0.1.0"

_LAZY = {
    "CISPOConfig": "algorithms",
    "DAPOConfig": "algorithms",
    "DPOConfig": "config",
    "DPOModule": "modules",
    "DrGRPOConfig": "algorithms",
    "GRPOConfig": "algorithms",
    "GSPOConfig": "algorithms",
    "InstructionDataModule": "data",
    "KTOConfig": "config",
    "KTOModule": "modules",
    "PPOConfig": "algorithms",
    "PPOModule": "modules",
    "PreferenceDataModule": "data",
    "PromptDataModule": "data",
    "RLOOConfig": "algorithms",
    "ReinforcePlusPlusBaselineConfig": "algorithms",
    "ReinforcePlusPlusConfig": "algorithms",
    "RewardConfig": "config",
    "RewardModule": "modules",
    "Rollout": "generation",
    "RolloutConfig": "config",
    "SFTConfig": "config",
    "SFTModule": "modules",
    "SamplingParams": "generation",
    "generate": "generation",
}

__all__ = [
    "CISPOConfig",
    "DAPOConfig",
    "DPOConfig",
    "DPOModule",
    "DrGRPOConfig",
    "EngineSpec",
    "GRPOConfig",
    "GSPOConfig",
    "HybridDeepSpeedStrategy",
    "InstructionDataModule",
    "KTOConfig",
    "KTOModule",
    "LightningHybridError",
    "PPOConfig",
    "PPOModule",
    "PreferenceDataModule",
    "PromptDataModule",
    "RLOOConfig",
    "ReinforcePlusPlusBaselineConfig",
    "ReinforcePlusPlusConfig",
    "RewardConfig",
    "RewardModule",
    "Rollout",
    "RolloutConfig",
    "SFTConfig",
    "SFTModule",
    "SamplingParams",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lightning_hybrid' has no attribute {name!r}")
    return getattr(import_module(f"lightning_hybrid.{_LAZY[name]}"), name)
