"""Rewards: text in, one finite score per response out, or an error that names the sample on every rank."""

from __future__ import annotations

from lightning_hybrid.rewards.base import Fields, Reward, check_fields
from lightning_hybrid.rewards.cache import CachedReward
from lightning_hybrid.rewards.classifier import ClassifierReward
from lightning_hybrid.rewards.function import RewardCallable, RewardFunction
from lightning_hybrid.rewards.learned import LearnedReward
from lightning_hybrid.rewards.load import load_learned, load_model_reward, load_reward_function, reward_from
from lightning_hybrid.rewards.remote import RemoteReward
from lightning_hybrid.rewards.served import ServedReward
from lightning_hybrid.rewards.verify import ExactReward, FormatReward, GSM8KReward, MathReward, RepetitionPenalty
from lightning_hybrid.rewards.weighted import WeightedRewards

__all__ = [
    "CachedReward",
    "ClassifierReward",
    "ExactReward",
    "Fields",
    "FormatReward",
    "GSM8KReward",
    "LearnedReward",
    "MathReward",
    "RemoteReward",
    "RepetitionPenalty",
    "Reward",
    "RewardCallable",
    "RewardFunction",
    "ServedReward",
    "WeightedRewards",
    "check_fields",
    "load_learned",
    "load_model_reward",
    "load_reward_function",
    "reward_from",
]
