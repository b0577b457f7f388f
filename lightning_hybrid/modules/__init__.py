"""LightningModules: supervised fine-tuning, reward modelling, PPO."""

from lightning_hybrid.modules.ppo import PPOModule
from lightning_hybrid.modules.reward import RewardModule
from lightning_hybrid.modules.sft import SFTModule

__all__ = ["PPOModule", "RewardModule", "SFTModule"]
