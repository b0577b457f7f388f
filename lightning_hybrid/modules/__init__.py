"""LightningModules: supervised fine-tuning, reward modelling, preference optimisation, PPO."""

from lightning_hybrid.modules.dpo import DPOModule
from lightning_hybrid.modules.kto import KTOModule
from lightning_hybrid.modules.ppo import PPOModule
from lightning_hybrid.modules.reward import RewardModule
from lightning_hybrid.modules.sft import SFTModule

__all__ = ["DPOModule", "KTOModule", "PPOModule", "RewardModule", "SFTModule"]
