"""Means over rows that lie on several ranks and in several batches, of which each counts once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from lightning import Trainer


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


def rows_that_count(trainer: Trainer, batch_idx: int, rows: int) -> int:
    """How many of the rows of a validation batch count, which are the first ones.

    The last ones may be rows of other ranks, which a sampler repeats so that all ranks have as many.

    Args:
        trainer: that validates.
        batch_idx: number of the batch.
        rows: that it has.
    """
    loaders: Any = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or loader.batch_size is None:
        return rows
    first: int = batch_idx * loader.batch_size
    dealt = range(sampler.rank, len(sampler.dataset), sampler.num_replicas)  # type: ignore[arg-type]
    return max(0, min(rows, len(dealt) - first))


def over_ranks(trainer: Trainer, means: Mapping[str, Tensor], count: int) -> tuple[dict[str, Tensor], int]:
    """Means over the rows of a batch on all ranks, and how many these are; all ranks call it.

    Logged with that number as ``batch_size``, they are averaged as they should be: Lightning's own average over ranks
    rounds the numbers of rows where they differ.

    Args:
        trainer: whose ranks.
        means: 0-dim each, over the rows of this rank; whatever they are where it has none.
        count: of the rows of this rank.
    """
    own = torch.stack([*means.values()]).detach().double()
    sums = torch.cat([own * count if count else torch.zeros_like(own), own.new_tensor([count])])
    reduced: Tensor = trainer.strategy.reduce(sums, reduce_op="sum")
    *totals, together = reduced.unbind()
    return dict(zip(means, (total / together for total in totals), strict=True)), int(together)
