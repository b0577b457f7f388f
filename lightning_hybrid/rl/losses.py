"""Losses of SFT, reward modelling and PPO, and how token losses become one number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.rl.kl import clamped_log_ratio, estimate_kl
from lightning_hybrid.rl.masking import check_batch_time, masked_mean, widen

AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def aggregate(
    x: Tensor,
    mask: Tensor,
    mode: str = "token_mean",
    norm: float | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Reduces token losses to one number.

    - ``token_mean``: sum over valid tokens, divided by the number of valid tokens.
    - ``seq_mean_token_mean``: mean over sequences of each sequence's token mean.
    - ``seq_mean_token_sum``: mean over sequences of each sequence's token sum.
    - ``seq_mean_token_sum_norm``: the same with each token sum divided by ``norm`` (Liu et al. 2025, "Dr. GRPO").

    Sequences without a valid token are not counted.

    Args:
        x: Float[B, T].
        mask: Bool[B, T].
        mode: One of the above.
        norm: Divisor of ``seq_mean_token_sum_norm``; None takes the padded length T. Pass a constant, such as the
            largest response length, where micro-batches may be padded differently. Unused by the other modes.
        denominator: Number to divide the sum by, instead of the count found in ``mask``: valid tokens for
            ``token_mean``, sequences for the others. With the count of the global minibatch, the losses of its
            micro-batches add up to the loss of the whole, however it was cut.

    Returns:
        Float, 0-dim; 0 where nothing counts.

    Raises:
        ValueError: Unknown mode, wrong shape or dtype of the mask, or ``norm`` not positive.
    """
    check_batch_time(mask, x=x)
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregation mode is {mode!r}, allowed are {', '.join(AGGREGATIONS)}")
    kept = widen(x).masked_fill(~mask, 0.0)
    if mode == "token_mean":
        return _divide(kept.sum(), mask.sum() if denominator is None else denominator)
    sequence_losses = kept.sum(1) / _sequence_divisor(mask, mode, norm)
    return _divide(sequence_losses.sum(), mask.any(1).sum() if denominator is None else denominator)


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
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss (Schulman et al. 2017, equation 7), to be minimised.

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

    Returns:
        The loss, 0-dim, and detached 0-dim metrics over the valid tokens: ``clip_fraction`` (tokens whose loss was
        clipped), ``ratio_mean``, ``ratio_max`` and ``approx_kl`` (k3 of KL(old ‖ new), nats).

    Raises:
        ValueError: Wrong shape, mask dtype or aggregation, a negative clip, or ``dual_clip`` not above 1.
    """
    check_batch_time(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    _check_policy_clips(clip_low, clip_high, dual_clip)
    # Filled before the exponential: a NaN or an infinity behind the mask would come back as a NaN gradient.
    logprobs, old_logprobs = logprobs.masked_fill(~mask, 0.0), old_logprobs.masked_fill(~mask, 0.0)
    advantages = widen(advantages).masked_fill(~mask, 0.0)
    ratio = clamped_log_ratio(logprobs, old_logprobs).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if weights is not None:
        check_batch_time(mask, weights=weights)
        losses = losses * widen(weights).detach().masked_fill(~mask, 0.0)
    with torch.no_grad():
        metrics = {
            "clip_fraction": masked_mean((clipped > unclipped).to(losses.dtype), mask),
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": ratio.masked_fill(~mask, 0.0).max(),
            "approx_kl": masked_mean(estimate_kl(old_logprobs, logprobs, "k3"), mask),
        }
    return aggregate(losses, mask, aggregation, norm, denominator), metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    aggregation: str = "token_mean",
    norm: float | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the critic; where clipped, the larger of the clipped and the unclipped square.

    Args:
        values: Float[B, T], of the critic being trained.
        old_values: Float[B, T], the critic's at rollout time.
        returns: Float[B, T], as :func:`~lightning_hybrid.rl.gae` gives them.
        mask: Bool[B, T].
        clip: How far the clipped value may be from the old one, in units of value; None does not clip.
        aggregation: A mode of :func:`aggregate`.
        norm: As in :func:`aggregate`.
        denominator: As in :func:`aggregate`.

    Returns:
        The loss, 0-dim, and detached 0-dim metrics over the valid tokens: ``value_clip_fraction`` (tokens whose loss
        was clipped) and ``explained_variance`` (1 for perfect values; 0 where the returns do not vary).

    Raises:
        ValueError: Wrong shape, mask dtype or aggregation, or a negative ``clip``.
    """
    check_batch_time(mask, values=values, old_values=old_values, returns=returns)
    _check_not_negative("clip", clip)
    values, old_values, returns = (widen(x).masked_fill(~mask, 0.0) for x in (values, old_values, returns))
    squares = (values - returns).square()
    hit = torch.zeros_like(mask)
    if clip is not None:
        change = values - old_values
        clipped_squares = (old_values + change.clamp(-clip, clip) - returns).square()
        # Not by the squares alone: within the limit they differ by rounding.
        hit = (change.abs() > clip) & (clipped_squares > squares)
        squares = torch.maximum(squares, clipped_squares)
    with torch.no_grad():
        metrics = {
            "value_clip_fraction": masked_mean(hit.to(squares.dtype), mask),
            "explained_variance": _explained_variance(values, returns, mask),
        }
    return aggregate(0.5 * squares, mask, aggregation, norm, denominator), metrics


def preference_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
    """Bradley–Terry loss: mean of ``-log sigmoid(chosen - rejected - margin)`` (margin: Touvron et al. 2023, Llama 2).

    Args:
        chosen: Float[B], scores of the preferred responses.
        rejected: Float[B], scores of the others.
        margin: Float[B] or a number, by how much the chosen score should lead; None is 0.

    Returns:
        Float, 0-dim.

    Raises:
        ValueError: The shapes differ.
    """
    if rejected.shape != chosen.shape:
        raise ValueError(f"rejected has shape {list(rejected.shape)}, allowed is that of chosen, {list(chosen.shape)}")
    if isinstance(margin, Tensor) and margin.shape not in (chosen.shape, torch.Size()):
        raise ValueError(f"margin has shape {list(margin.shape)}, allowed is that of chosen, {list(chosen.shape)}")
    lead = widen(chosen) - widen(rejected)
    return -F.logsigmoid(lead if margin is None else lead - margin).mean()


def _sequence_divisor(mask: Tensor, mode: str, norm: float | None) -> Tensor | float:
    """What each sequence's token sum is divided by: Long[B] or a number."""
    if mode == "seq_mean_token_mean":
        return mask.sum(1).clamp(min=1)
    if mode == "seq_mean_token_sum":
        return 1.0
    if norm is not None and not norm > 0:
        raise ValueError(f"norm is {norm}, allowed are positive numbers and None (the padded length)")
    return float(max(mask.shape[1], 1)) if norm is None else norm


def _divide(total: Tensor, count: float | Tensor) -> Tensor:
    """Divides by a count that may be 0 (nothing counts, so the total is 0) or a fraction (a rank's share)."""
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total / torch.where(count == 0, torch.ones_like(count), count)


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), 0-dim."""
    residual = _masked_variance(returns - values, mask)
    spread = _masked_variance(returns, mask)
    return torch.where(spread > 0, 1 - residual / spread, torch.zeros_like(spread))


def _masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def _check_policy_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    _check_not_negative("clip_low", clip_low)
    _check_not_negative("clip_high", clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}, allowed are numbers above 1 and None (no dual clipping)")


def _check_not_negative(name: str, limit: float | None) -> None:
    if limit is not None and not limit >= 0:
        raise ValueError(f"{name} is {limit}, allowed are numbers from 0 up")
