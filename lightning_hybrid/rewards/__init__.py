"""Rewards: text in, one finite score per response out, or an error that names the sample on every rank."""

from __future__ import annotations

from lightning_hybrid.rewards.function import RewardCallable, RewardFunction
from lightning_hybrid.rewards.learned import LearnedReward
from lightning_hybrid.rewards.load import load_reward_function, reward_from
from lightning_hybrid.rewards.remote import RemoteReward

__all__ = [
    "LearnedReward",
    "RemoteReward",
    "RewardCallable",
    "RewardFunction",
    "load_reward_function",
    "reward_from",
]
