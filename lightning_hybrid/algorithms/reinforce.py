"""REINFORCE++: token-level REINFORCE whose advantages are normalised over the whole batch."""

from __future__ import annotations

from typing import Literal

from lightning_hybrid.algorithms.group import GroupConfig
from lightning_hybrid.algorithms.judged import Credit, Judged
from lightning_hybrid.algorithms.online import OnlineConfig
from lightning_hybrid.algorithms.optimizer import UnitInterval
from lightning_hybrid.rl import discounted_returns, group_advantages, whiten


class ReinforcePlusPlusConfig(OnlineConfig):
    """REINFORCE++ (Hu et al. 2025): a token's advantage is the reward still to come, whitened over all tokens."""

    name: str = "reinforce_plus_plus"
    """which algorithm this is"""
    gamma: UnitInterval = 1.0
    """discount of later rewards"""

    def credit(self, judged: Judged) -> Credit:
        """Discounted returns, whitened over the tokens of all ranks."""
        rewards = judged.token_rewards(self.reward_clip)
        returns = discounted_returns(rewards, judged.mask, self.gamma)
        return Credit(rewards, whiten(returns, judged.mask, reduce=judged.sum_over_ranks))


class ReinforcePlusPlusBaselineConfig(GroupConfig):
    """REINFORCE++ with the mean of a prompt's responses as the baseline (Hu et al. 2025, section 3.3)."""

    name: str = "reinforce_plus_plus_baseline"
    """which algorithm this is"""
    kl_placement: Literal["reward", "loss"] = "loss"
    """where the KL is charged: reward (k1, off the reward of each token), loss (kl_estimator, as a term of its own)"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    """estimator of the KL that is logged, that kl_target refers to, and of a KL loss (Schulman 2020)"""

    def credit(self, judged: Judged) -> Credit:
        """Differences to the group's mean, whitened over the tokens of all ranks."""
        rewards = judged.token_rewards(self.reward_clip)
        above_mean = judged.on_tokens(group_advantages(rewards.sum(1), judged.group, "dr_grpo"))
        return Credit(rewards, whiten(above_mean, judged.mask, reduce=judged.sum_over_ranks))
