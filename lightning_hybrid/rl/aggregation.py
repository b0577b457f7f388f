"""How the losses of tokens become one number."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hybrid.rl.masking import check_batch_time, widen

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
