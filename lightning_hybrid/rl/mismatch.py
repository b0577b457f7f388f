"""The gap between rollout and training log-probs, and importance weights that make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hybrid.rl.kl import clamped_log_ratio
from lightning_hybrid.rl.masking import check_batch_time

USUAL_RATIOS = (0.9, 1.1)


def logprob_gap(training: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What micro-batches and ranks add up to tell how far two computations of the same log-probs are apart.

    Args:
        training: Float[B, T], by the training forward.
        rollout: Float[B, T], as the rollout had them.
        mask: Bool[B, T].

    Returns:
        Detached 0-dim float64: ``gap`` (sum of |Δ| in nats), ``outside`` (tokens whose ratio
        ``exp(training - rollout)`` is outside [0.9, 1.1], or not a number), ``tokens`` (how many count) to add up,
        and ``gap_max`` (the largest |Δ|) to take the largest of.

    Raises:
        ValueError: A shape or the mask's dtype is wrong.
    """
    check_batch_time(mask, training=training, rollout=rollout)
    lowest, highest = USUAL_RATIOS
    difference = (training.detach().double() - rollout.detach().double()).masked_fill(~mask, 0.0)
    ratio = difference.exp()
    inside = (ratio >= lowest) & (ratio <= highest)
    return {
        "gap": difference.abs().sum(),
        "outside": (~inside).sum().double(),
        "tokens": mask.sum().double(),
        "gap_max": difference.abs().max() if mask.numel() else difference.sum(),
    }


def truncated_importance_weights(training: Tensor, rollout: Tensor, mask: Tensor, cap: float) -> Tensor:
    """How much more probable each token was to the model in training than when it was drawn, at most ``cap``.

    Multiplied into the policy loss, the weights make up for tokens that were drawn from another distribution than the
    training forward's; the cap bounds the variance (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training").

    Args:
        training: Float[B, T], log-probs by the training forward, with the weights that sampled.
        rollout: Float[B, T], log-probs under the distribution that the tokens were drawn from.
        mask: Bool[B, T].
        cap: Largest weight, at least 1.

    Returns:
        Float[B, T] without a gradient: ``min(exp(training - rollout), cap)``; masked positions are 0.

    Raises:
        ValueError: A shape or the mask's dtype is wrong, or ``cap`` is below 1.
    """
    check_batch_time(mask, training=training, rollout=rollout)
    if not cap >= 1:
        raise ValueError(f"cap is {cap}, allowed are numbers from 1 up: below 1, equal log-probs would be scaled down")
    with torch.no_grad():
        return clamped_log_ratio(training, rollout).exp().clamp(max=cap).masked_fill(~mask, 0.0)
