"""Proximal policy optimization, with a critic."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from lightning_hybrid.algorithms.judged import Credit, Judged
from lightning_hybrid.algorithms.online import AboveOne, OnlineConfig
from lightning_hybrid.algorithms.optimizer import UnitInterval
from lightning_hybrid.rl import gae, whiten


class PPOConfig(OnlineConfig):
    """Proximal policy optimization on token level with a KL penalty (Schulman et al. 2017; Ouyang et al. 2022).

    Example:
        >>> PPOConfig(kl_coef=0.02, epochs=2).clip_low
        0.2
    """

    critic: ClassVar[bool] = True

    name: str = "ppo"
    """which algorithm this is"""
    gamma: UnitInterval = 1.0
    """discount of later rewards"""
    lam: UnitInterval = 0.95
    """lambda of generalized advantage estimation"""
    dual_clip: AboveOne | None = None
    """bound on the loss of bad actions as a multiple of the advantage (Ye et al. 2020); null for none"""
    value_clip: PositiveFloat = 0.2
    """how far a value may move from the one of the rollout"""
    reward_clip: PositiveFloat | None = 5.0
    """scores are limited to [-reward_clip, reward_clip]; null for no limit"""
    whiten_advantages: bool = True
    """give the advantages of a rollout batch mean 0 and variance 1"""
    critic_lr: PositiveFloat = 1e-5
    """peak learning rate of the critic"""
    critic_warmup_steps: NonNegativeInt = 0
    """first iterations that train the critic only"""

    def credit(self, judged: Judged) -> Credit:
        """Generalized advantage estimation over the critic's values."""
        if judged.values is None:
            raise ValueError("PPO estimates advantages from the values of a critic: judged.values is None")
        rewards = judged.token_rewards(self.reward_clip)
        advantages, returns = gae(rewards, judged.values, judged.mask, self.gamma, self.lam)
        if self.whiten_advantages:
            advantages = whiten(advantages, judged.mask, reduce=judged.sum_over_ranks)
        return Credit(rewards, advantages, returns)

    def policy_loss(self, logprobs: Tensor, old_logprobs: Tensor, **terms: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped ratios of tokens, clipped on the other side too where ``dual_clip`` is set."""
        return super().policy_loss(logprobs, old_logprobs, dual_clip=self.dual_clip, **terms)
