"""From sequence scores to token rewards, and from token rewards to advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hybrid.rl.kl import estimate_kl
from lightning_hybrid.rl.masking import check_batch_time, widen


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    kl_coef: float,
    clip: float | None = None,
) -> Tensor:
    """Charges the KL penalty on every valid token and pays the sequence score on the last one (Ziegler et al. 2019).

    A row without a valid token gets nothing: there is no token to pay.

    Args:
        scores: Float[B], one score per sequence.
        logprobs: Float[B, T], under the policy that sampled the tokens.
        ref_logprobs: Float[B, T], under the reference.
        mask: Bool[B, T], True on response tokens; holes are allowed.
        kl_coef: Price of one nat of the k1 estimate.
        clip: Limits scores to [-clip, clip]; None leaves them.

    Returns:
        Float[B, T]; masked positions are 0.

    Raises:
        ValueError: A shape or the mask's dtype is wrong, or ``clip`` is not positive.
    """
    check_batch_time(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores has shape {list(scores.shape)}, allowed is {list(mask.shape[:1])}: one per sequence")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, allowed are positive numbers and None (no clipping)")
    scores = widen(scores) if clip is None else widen(scores).clamp(-clip, clip)
    penalty = (-kl_coef * estimate_kl(logprobs, ref_logprobs)).masked_fill(~mask, 0.0)
    bonus = scores.unsqueeze(1).expand_as(penalty).masked_fill(~_last_valid(mask), 0.0)
    return penalty + bonus


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16) over the valid tokens only.

    Masked holes, in the middle too, are skipped: the recursion goes from a valid token straight to the next valid one,
    and neither the reward nor the value of a hole enters. After the last valid token the value is 0.

    Args:
        rewards: Float[B, T], as :func:`token_rewards` gives them.
        values: Float[B, T], the critic's value of the state before each token.
        mask: Bool[B, T].
        gamma: Discount, in [0, 1].
        lam: Weight of longer returns, in [0, 1].

    Returns:
        Advantages Float[B, T], and returns Float[B, T] (advantages plus values); masked positions are 0.

    Raises:
        ValueError: A shape or the mask's dtype is wrong.
    """
    check_batch_time(mask, rewards=rewards, values=values)
    rewards = widen(rewards).masked_fill(~mask, 0.0)
    values = widen(values).masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards + values)
    next_advantage = next_value = advantages.new_zeros(mask.shape[0])
    for t in reversed(range(mask.shape[1])):
        valid = mask[:, t]
        error = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(valid, error + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def _last_valid(mask: Tensor) -> Tensor:
    """Marks the last True of each row of Bool[B, T]: the one from which on exactly one is left."""
    left = mask.flip(1).cumsum(1).flip(1)
    return mask & (left == 1)
