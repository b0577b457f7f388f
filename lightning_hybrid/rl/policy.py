"""Losses of the policy: clipped ratios of tokens or of whole sequences, and clipped importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hybrid.rl.aggregation import aggregate
from lightning_hybrid.rl.kl import clamped_log_ratio, estimate_kl
from lightning_hybrid.rl.masking import check_batch_time, check_not_negative, masked_mean, widen

LEVELS = ("token", "sequence")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    norm: float | None = None,
    denominator: float | Tensor | None = None,
    weights: Tensor | None = None,
    level: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss (Schulman et al. 2017, equation 7), to be minimised.

    At the level of sequences (GSPO, Zheng et al. 2025, equations 5 and 7) the ratio of every token is that of its
    whole sequence, ``exp`` of the mean log-ratio of its valid tokens, and its advantage is the mean of theirs.

    Args:
        logprobs: Float[B, T], under the policy being trained.
        old_logprobs: Float[B, T], under the policy that sampled.
        advantages: Float[B, T].
        mask: Bool[B, T].
        clip_low: The ratio is clipped below at ``1 - clip_low``.
        clip_high: The ratio is clipped above at ``1 + clip_high``.
        dual_clip: Bounds the loss of a negative advantage A by ``-dual_clip * A`` (Ye et al. 2020); above 1.
        aggregation: A mode of :func:`aggregate`.
        norm: As in :func:`aggregate`.
        denominator: As in :func:`aggregate`.
        weights: Float[B, T], factors of the token losses, such as
            :func:`~lightning_hybrid.rl.truncated_importance_weights`; they get no gradient. None is 1 everywhere.
        level: "token" or "sequence", what has a ratio.

    Returns:
        The loss, 0-dim, and detached 0-dim metrics over the valid tokens: ``clip_fraction`` (tokens whose loss was
        clipped), ``ratio_mean``, ``ratio_max`` and ``approx_kl`` (k3 of KL(old ‖ new), nats).

    Raises:
        ValueError: Wrong shape, mask dtype, aggregation or level, a negative clip, or ``dual_clip`` not above 1.
    """
    _check_clips(clip_low, clip_high, dual_clip)
    logprobs, old_logprobs, advantages = _valid(mask, logprobs, old_logprobs, advantages)
    log_ratio = clamped_log_ratio(logprobs, old_logprobs)
    if level == "sequence":
        log_ratio, advantages = _of_sequences(log_ratio, mask), _of_sequences(advantages, mask)
    elif level != "token":
        raise ValueError(f"level is {level!r}, allowed are {', '.join(LEVELS)}")
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    metrics = _metrics(clipped > unclipped, ratio, logprobs, old_logprobs, mask)
    return aggregate(_weighted(losses, weights, mask), mask, aggregation, norm, denominator), metrics


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
    aggregation: str = "token_mean",
    norm: float | None = None,
    denominator: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with clipped importance weights (CISPO, MiniMax 2025, equations 4 and 5), to be minimised.

    A token's loss is ``-clip(ratio) * A * logprob`` with no gradient through the clipped ratio: unlike PPO's, a token
    whose ratio is clipped keeps its gradient.

    Args:
        logprobs: Float[B, T], under the policy being trained.
        old_logprobs: Float[B, T], under the policy that sampled.
        advantages: Float[B, T].
        mask: Bool[B, T].
        clip_low: The ratio is clipped below at ``1 - clip_low``; 1 is no limit.
        clip_high: The ratio is clipped above at ``1 + clip_high``.
        aggregation: A mode of :func:`aggregate`.
        norm: As in :func:`aggregate`.
        denominator: As in :func:`aggregate`.
        weights: As in :func:`policy_loss`.

    Returns:
        The loss and the metrics of :func:`policy_loss`; ``clip_fraction`` counts tokens whose ratio was clipped.

    Raises:
        ValueError: Wrong shape, mask dtype or aggregation, or a negative clip.
    """
    _check_clips(clip_low, clip_high, None)
    logprobs, old_logprobs, advantages = _valid(mask, logprobs, old_logprobs, advantages)
    ratio = clamped_log_ratio(logprobs, old_logprobs).exp().detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -clipped * advantages * widen(logprobs)
    metrics = _metrics(clipped != ratio, ratio, logprobs, old_logprobs, mask)
    return aggregate(_weighted(losses, weights, mask), mask, aggregation, norm, denominator), metrics


def _valid(mask: Tensor, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with 0 outside the mask: a NaN or an infinity behind it would come back as a NaN gradient."""
    check_batch_time(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    logprobs, old_logprobs = logprobs.masked_fill(~mask, 0.0), old_logprobs.masked_fill(~mask, 0.0)
    return logprobs, old_logprobs, widen(advantages).masked_fill(~mask, 0.0)


def _of_sequences(x: Tensor, mask: Tensor) -> Tensor:
    """Every token's value replaced by the mean of its sequence, Float[B, T]."""
    return masked_mean(x, mask, dim=1)[:, None].expand_as(x)


def _weighted(losses: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    if weights is None:
        return losses
    check_batch_time(mask, weights=weights)
    return losses * widen(weights).detach().masked_fill(~mask, 0.0)


@torch.no_grad()
def _metrics(clipped: Tensor, ratio: Tensor, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "clip_fraction": masked_mean(clipped.to(ratio.dtype), mask),
        "ratio_mean": masked_mean(ratio, mask),
        "ratio_max": ratio.masked_fill(~mask, 0.0).max(),
        "approx_kl": masked_mean(estimate_kl(old_logprobs, logprobs, "k3"), mask),
    }


def _check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    check_not_negative("clip_low", clip_low)
    check_not_negative("clip_high", clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}, allowed are numbers above 1 and None (no dual clipping)")
