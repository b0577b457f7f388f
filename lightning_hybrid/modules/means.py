"""Means over rows that lie on several ranks and in several batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Means:
    """Sums and counts of named figures, added up before anything is divided: every row weighs the same in the end.

    Args:
        names: of the figures, the same on all ranks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums_and_counts: Tensor | None = None

    def clear(self) -> None:
        """Begin anew."""
        self._sums_and_counts = None

    def add(self, sums_and_counts: Tensor) -> None:
        """Take in what :meth:`pack` made, of this rank or of all ranks together."""
        held = self._sums_and_counts
        self._sums_and_counts = sums_and_counts if held is None else held + sums_and_counts

    def pack(self, figures: Mapping[str, Tensor]) -> Tensor:
        """Sum and count of each figure: Float64[2, names], to be added up over ranks.

        Args:
            figures: by name, one number for each row that the figure is of; not every row has every figure.
        """
        values = [figures[name].detach().double() for name in self.names]
        sums = torch.stack([value.sum() for value in values])
        return torch.stack([sums, torch.tensor([float(len(value)) for value in values]).to(sums)])

    @property
    def packed(self) -> Tensor | None:
        """All that was taken in, Float64[2, names]; None where that is nothing."""
        return self._sums_and_counts

    def means(self) -> dict[str, float]:
        """The mean of each figure that any row had."""
        if self._sums_and_counts is None:
            return {}
        sums, counts = self._sums_and_counts.tolist()
        return {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n > 0}
