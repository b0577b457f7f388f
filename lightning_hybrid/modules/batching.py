"""Which rows are computed together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def micro_batches(mask: Tensor, micro_batch_size: int) -> Iterator[Tensor]:
    """Cut the rows of ``mask`` ``[batch, time]`` into index tensors of at most ``micro_batch_size``.

    Rows of like width, by where their real tokens begin and end, come together: less padding is computed.
    """
    time = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, time, mask.shape[1]).amin(1)
    last = torch.where(mask, time, -1).amax(1)
    order = torch.argsort(last * (mask.shape[1] + 1) - first, stable=True)
    yield from order.cpu().split(micro_batch_size)  # it indexes rows chosen on the host


def minibatches(size: int, minibatch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Cut ``size`` rows at random into minibatches; one that holds them all keeps their order."""
    order = torch.arange(size) if minibatch_size >= size else torch.randperm(size, generator=generator)
    return list(order.split(minibatch_size))
