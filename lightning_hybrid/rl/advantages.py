"""From sequence scores to token rewards, and from rewards to advantages, of tokens or within groups of responses."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hybrid.rl.kl import estimate_kl
from lightning_hybrid.rl.masking import check_batch_time, widen

GROUP_KINDS = ("grpo", "dr_grpo", "rloo")
GROUP_STD_EPS = 1e-6


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


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sums the rewards from each valid token on, a later one discounted by ``gamma`` for each valid token between.

    Masked holes are skipped, as in :func:`gae`.

    Args:
        rewards: Float[B, T].
        mask: Bool[B, T].
        gamma: Discount, in [0, 1].

    Returns:
        Float[B, T]; masked positions are 0.

    Raises:
        ValueError: A shape or the mask's dtype is wrong.
    """
    # Without values and at lambda 1, the advantage of a token is what is still to come.
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)
    return advantages


def group_advantages(scores: Tensor, group: Tensor, kind: str = "grpo") -> Tensor:
    """Compares each response with the others to the same prompt.

    - ``grpo``: ``(s - mean) / (std + 1e-6)``, std unbiased (Shao et al. 2024, "DeepSeekMath", section 4.1.2).
    - ``dr_grpo``: ``s - mean`` (Liu et al. 2025, "Dr. GRPO").
    - ``rloo``: ``s`` less the mean of the *other* responses (Kool et al. 2019; Ahmadian et al. 2024, equation 7).

    A group of one has nothing to be compared with, and a group of equal scores no difference: both get 0, exactly.

    Args:
        scores: Float[B].
        group: Integer[B]; responses of the same number answer the same prompt, in any order.
        kind: One of the above.

    Returns:
        Float[B].

    Raises:
        ValueError: Unknown kind, or the shapes differ or are not ``[batch]``.
    """
    if kind not in GROUP_KINDS:
        raise ValueError(f"kind is {kind!r}, allowed are {', '.join(GROUP_KINDS)}")
    centred, index, count = centre_groups(scores, group)
    size = count[index]
    if kind == "rloo":
        return centred * size / (size - 1).clamp(min=1)
    if kind == "dr_grpo":
        return centred
    squares = torch.zeros_like(count).index_add_(0, index, centred.square())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return centred / (std[index] + GROUP_STD_EPS)


def centre_groups(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtracts from each score the mean of its group; exactly 0 where a group's scores are equal.

    Args:
        scores: Float[B].
        group: Integer[B].

    Returns:
        The differences Float[B], for each score the index of its group among the G distinct ones Long[B], and the
        sizes of the groups Float[G].

    Raises:
        ValueError: The shapes differ or are not ``[batch]``.
    """
    if scores.dim() != 1 or group.shape != scores.shape:
        raise ValueError(f"scores has shape {list(scores.shape)} and group {list(group.shape)}, allowed is [batch]")
    scores = widen(scores)
    numbers, index = group.unique(return_inverse=True)
    zeros = scores.new_zeros(len(numbers))
    count = zeros.index_add(0, index, torch.ones_like(scores))
    # Measured from the group's least: the mean of equal numbers is rounded, that of zeros is not.
    least = zeros.scatter_reduce(0, index, scores, "amin", include_self=False)
    above = scores - least[index]
    return above - (zeros.index_add(0, index, above) / count)[index], index, count


def _last_valid(mask: Tensor) -> Tensor:
    """Marks the last True of each row of Bool[B, T]: the one from which on exactly one is left."""
    left = mask.flip(1).cumsum(1).flip(1)
    return mask & (left == 1)
