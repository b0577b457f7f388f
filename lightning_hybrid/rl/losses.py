"""Losses of the critic and of reward modelling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.rl.aggregation import aggregate
from lightning_hybrid.rl.masking import check_batch_time, check_not_negative, masked_mean, widen


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
    check_not_negative("clip", clip)
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


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), 0-dim."""
    residual = _masked_variance(returns - values, mask)
    spread = _masked_variance(returns, mask)
    return torch.where(spread > 0, 1 - residual / spread, torch.zeros_like(spread))


def _masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
