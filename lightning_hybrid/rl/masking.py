"""Statistics over the positions that count."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VARIANCE_EPS = 1e-8


def widen(x: Tensor) -> Tensor:
    """Returns ``x`` in float32 or higher: half precision is too coarse for counts, sums and exponentials."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_masked(mask: Tensor, **tensors: Tensor) -> None:
    """Checks that ``mask`` is boolean and that every named tensor has its shape.

    Args:
        mask: Bool, any shape.
        **tensors: The tensors the mask belongs to, under the names that an error should use.

    Raises:
        ValueError: The mask is not boolean, or a tensor has another shape.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, allowed is torch.bool (True = counts): pass mask.bool()")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, allowed is the mask's {list(mask.shape)}")


def check_batch_time(mask: Tensor, **tensors: Tensor) -> None:
    """Checks like :func:`check_masked`, and that the mask is ``[batch, time]``.

    Args:
        mask: Bool[B, T].
        **tensors: The tensors the mask belongs to, under the names that an error should use.

    Raises:
        ValueError: The mask is not a boolean matrix, or a tensor has another shape.
    """
    check_masked(mask, **tensors)
    if mask.dim() != 2:
        raise ValueError(f"mask has shape {list(mask.shape)}, allowed is [batch, time]")


def check_not_negative(name: str, limit: float | None) -> None:
    """Raises a ``ValueError`` that names a limit below 0; None is no limit."""
    if limit is not None and not limit >= 0:
        raise ValueError(f"{name} is {limit}, allowed are numbers from 0 up")


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the positions where ``mask`` is True; 0 where nothing counts.

    Args:
        x: Float, any shape.
        mask: Bool, the shape of ``x``.
        dim: The dimension to reduce; None reduces all.

    Returns:
        Float, 0-dim or the shape of ``x`` without ``dim``.

    Raises:
        ValueError: ``mask`` is not boolean or has another shape.
    """
    check_masked(mask, x=x)
    kept = widen(x).masked_fill(~mask, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Scales the valid positions to unit variance (unbiased, plus 1e-8 under the root) and, by default, zero mean.

    With fewer than two valid positions there is no variance: only the mean is subtracted. The squares are summed around
    the mean in a second pass, because a difference of large sums would lose the variance in float32.

    Args:
        x: Float, any shape.
        mask: Bool, the shape of ``x``.
        shift_mean: False adds the mean back, so that only the scale changes.
        reduce: Sums a small 1-dim float tensor across data-parallel ranks and returns the sum, so that the statistic
            is over all of them; it is called exactly twice. None: this tensor alone.

    Returns:
        Float, the shape of ``x``; masked positions are 0.

    Raises:
        ValueError: ``mask`` is not boolean or has another shape.
    """
    check_masked(mask, x=x)
    total = reduce if reduce is not None else _alone
    kept = widen(x).masked_fill(~mask, 0.0)
    count, value_sum = total(torch.stack((mask.sum().to(kept.dtype), kept.sum()))).unbind()
    mean = value_sum / count.clamp(min=1)
    centred = (kept - mean).masked_fill(~mask, 0.0)
    (square_sum,) = total(centred.square().sum().reshape(1)).unbind()
    variance = square_sum / (count - 1).clamp(min=1)
    scale = torch.where(count > 1, (variance + VARIANCE_EPS).rsqrt(), torch.ones_like(variance))
    whitened = centred * scale
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


def _alone(statistic: Tensor) -> Tensor:
    return statistic
