"""The order of an epoch: sources mixed by their shares, and rows that lie together read together."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_hybrid.data.dealing import DealtOrder
from lightning_hybrid.errors import DataError

# Blocks of rows whose rows are shuffled among themselves; as many row groups of a Parquet file are held at once.
WINDOW = 4


class Order(DealtOrder):
    """The order of an epoch that mixes sources or reads blocks of rows, and one rank's share of it.

    With shares, every place of the epoch draws its source with these probabilities, and takes the next row of that
    source in the source's own shuffled order; a source that has no more rows begins again in a new order. An epoch has
    as many rows as all sources together. Without shares, all rows are shuffled together.

    Where rows lie in blocks, such as the row groups of a Parquet file, the blocks are shuffled, and the rows of a few
    blocks at a time among themselves: this bounds what must be held.

    Args:
        blocks: For each source the sizes of its blocks, in order; one block where any row is at hand at once.
        shares: Probabilities of the sources; None to take each row once.
        seed: As all others: see `DealtOrder`.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]],
        shares: Sequence[float] | None,
        seed: int,
        epoch: Callable[[], int] | int = 0,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        self.blocks = [list(sizes) for sizes in blocks]
        self.shares = None if shares is None else list(shares)
        self.sizes = [sum(sizes) for sizes in self.blocks]
        super().__init__(sum(self.sizes), seed, epoch, ranks, rank)

    def order(self, epoch: int) -> list[int]:
        """The indices of one epoch, into all sources one after the other, for all ranks together."""
        return self._indices(epoch).tolist()

    def _indices(self, epoch: int) -> Tensor:
        """The same, Long[N]."""
        if self.shares is None:
            return _shuffled(sum(self.blocks, []), self._generator(f"{epoch}"))
        picks = self.picks(epoch)
        order = torch.empty(self.count, dtype=torch.long)
        begin = 0
        for source, size in enumerate(self.sizes):
            places = picks == source
            order[places] = begin + self._rounds(source, int(places.sum()), epoch)
            begin += size
        return order

    def picks(self, epoch: int) -> Tensor:
        """Which source each place of an epoch draws, Long[N]."""
        assert self.shares is not None
        bounds = torch.tensor(list(accumulate(self.shares)), dtype=torch.float64)
        draws = torch.rand(self.count, dtype=torch.float64, generator=self._generator(f"{epoch} sources"))
        return torch.bucketize(draws, bounds / bounds[-1], right=True)

    def _rounds(self, source: int, count: int, epoch: int) -> Tensor:
        """The first ``count`` rows of a source, which begins anew as often as needed; Long[count]."""
        generator = self._generator(f"{epoch} source {source}")
        rounds = -(-count // self.sizes[source])
        orders = [_shuffled(self.blocks[source], generator) for _ in range(rounds)]
        return torch.cat(orders)[:count] if orders else torch.empty(0, dtype=torch.long)

    def _generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(random.Random(f"{self.seed} {what}").getrandbits(63))


def _shuffled(blocks: Sequence[int], generator: torch.Generator) -> Tensor:
    """The rows of blocks: the blocks in a random order, the rows of `WINDOW` of them at a time shuffled; Long[N]."""
    begins = [0, *accumulate(blocks)]
    order = torch.randperm(len(blocks), generator=generator).tolist()
    windows = []
    for first in range(0, len(order), WINDOW):
        rows = torch.cat([torch.arange(begins[i], begins[i + 1]) for i in order[first : first + WINDOW]])
        windows.append(rows[torch.randperm(len(rows), generator=generator)])
    return torch.cat(windows)


class Joined(Dataset[Any]):
    """Data sets one after the other.

    Args:
        parts: The data sets.
        place: Tells an item its index among all.
    """

    def __init__(self, parts: Sequence[Any], place: Callable[[Any, int], Any]) -> None:
        self.parts = parts
        self._place = place
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        """Number of items of all."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        """One item."""
        part = bisect.bisect_right(self._ends, index)
        inside = index - (self._ends[part - 1] if part else 0)
        return self._place(self.parts[part][inside], index)


def refuse_empty_source(names: Sequence[str], datasets: Sequence[Any]) -> None:
    """Raise a `DataError` where a source has no row that could be drawn."""
    for name, dataset in zip(names, datasets, strict=True):
        if not len(dataset):
            raise DataError(
                f"nothing of {name} is left to mix, as all its rows are dropped or kept for validation: "
                "take it out of path and mix"
            )


def describe_mixture(names: Sequence[str], order: Order) -> str:
    """One line: of each source its share, its rows, and how often an epoch takes each."""
    assert order.shares is not None
    counts = torch.bincount(order.picks(0), minlength=len(names)).tolist()
    total = sum(order.shares)
    parts = [
        f"{share / total:.1%} {name} ({count:,} of an epoch's {order.count:,} draws, {size:,} rows, each "
        f"{count / size:.2f} times)"
        for name, share, count, size in zip(names, order.shares, counts, order.sizes, strict=True)
    ]
    return f"mixing {'; '.join(parts)}"
