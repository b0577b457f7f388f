"""Rotary tables, and the slopes of linear position biases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


class RotaryTables:
    """Cosine and sine of every position, as the model's own rotary module gives them for its whole range.

    Whatever scales the frequencies (linear, dynamic, llama3, yarn) has done so in the module. The sine is stored with
    the sign that ``rotate_half`` gives its first half, so that rotating is a roll and two products.

    Args:
        module: the rotary module.
        layer_types: one per layer for families whose frequencies depend on it, None for the others.
        positions: how many positions.
        like: a tensor with the device and dtype in which the model computes.
    """

    def __init__(self, module: Any, layer_types: list[str] | None, positions: int, like: Tensor) -> None:
        probe = torch.empty(0, dtype=like.dtype, device=like.device)
        index = torch.arange(positions, device=like.device)[None]
        kinds = [None] if layer_types is None else sorted(set(layer_types))
        self.tables = {kind: self._table(module, probe, index, kind) for kind in kinds}
        self.kinds: list[str | None] | None = None if layer_types is None else list(layer_types)

    @staticmethod
    def _table(module: Any, probe: Tensor, index: Tensor, kind: str | None) -> Rotary:
        cos, sin = module.forward(probe, index) if kind is None else module.forward(probe, index, kind)
        half = sin.shape[-1] // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)

    def at(self, positions: Tensor) -> dict[str | None, Rotary]:
        """Rows of the tables at ``positions`` ``[tokens]``, each ``[tokens, 1, rotary]``."""
        return {kind: (cos[positions, None], sin[positions, None]) for kind, (cos, sin) in self.tables.items()}

    def kind(self, layer: int) -> str | None:
        """Which table a layer reads."""
        return None if self.kinds is None else self.kinds[layer]


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate pairs ``(i, i + rotary/2)`` of ``[tokens, heads, head_dim]`` (Su et al. 2021); the rest stays."""
    cos, sin = rotary
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    result = turned * cos + torch.roll(turned, width // 2, -1) * sin
    return result if width == x.shape[-1] else torch.cat([result, x[..., width:]], -1)


def alibi_slopes(heads: int) -> Tensor:
    """Each head's slope, ``[heads]`` float32 (Press et al. 2022, section 3)."""
    powers = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-8.0 / powers)
    slopes = [base**i for i in range(1, powers + 1)]
    between = 2.0 ** (-4.0 / powers)
    slopes += [between**i for i in range(1, 2 * (heads - powers), 2)]
    return torch.tensor(slopes)
