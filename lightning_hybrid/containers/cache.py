"""The KV cache: one preallocated block, a slot for each row being generated."""

from __future__ import annotations

import torch
from torch import Tensor

# Capacities are rounded up to it, so that a row's sums are cut into blocks the same way whoever shares its batch.
BLOCK = 32


class KVCache:
    """Keys and values of all layers.

    Args:
        layers: how many.
        slots: rows that may be generated at once.
        heads: key-value heads on this rank.
        capacity: tokens a row may have, rounded up to a multiple of :data:`BLOCK`.
        dim: of a head.
        like: a tensor with the dtype and device to use.

    Attributes:
        data: ``[layers, 2, slots, heads, capacity, dim]``.
    """

    def __init__(self, layers: int, slots: int, heads: int, capacity: int, dim: int, like: Tensor) -> None:
        capacity = rounded(capacity)
        self.data = like.new_zeros(layers, 2, slots, heads, capacity, dim)

    @property
    def slots(self) -> int:
        """Rows that may be generated at once."""
        return self.data.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens a row may have."""
        return self.data.shape[4]

    @staticmethod
    def bytes_per_slot(layers: int, heads: int, capacity: int, dim: int, dtype: torch.dtype) -> int:
        """Memory of one slot."""
        return layers * 2 * heads * rounded(capacity) * dim * dtype.itemsize

    def keys(self, layer: int) -> Tensor:
        """``[slots, heads, capacity, dim]``."""
        return self.data[layer, 0]

    def values(self, layer: int) -> Tensor:
        """``[slots, heads, capacity, dim]``."""
        return self.data[layer, 1]

    def copy(self, source: Tensor, target: Tensor, upto: int) -> None:
        """Copy the first ``upto`` positions of slots ``source`` to slots ``target`` (both long ``[n]``, disjoint)."""
        for layer in self.data:  # one after another: what is copied exists twice for a moment
            layer[:, target, :, :upto] = layer[:, source, :, :upto]


def rounded(length: int) -> int:
    """``length`` up to the next multiple of :data:`BLOCK`."""
    return -(-length // BLOCK) * BLOCK
