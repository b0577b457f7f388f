"""Batches of texts of like length: less padding, and ranks that take equally long."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

from torch.utils.data import DistributedSampler

POOL = 32  # batches whose texts are sorted among themselves: the rest of the order stays random


class LikeLengths(DistributedSampler[int]):
    """An order in which texts of like length stand together, drawn anew in each epoch, and one rank's share of it.

    All texts are shuffled and cut into pools; each pool is sorted by length and cut into global batches; the global
    batches of all pools are shuffled. The order is dealt out to the ranks one index at a time, so that their batches of
    one step are of like length too. It is a `DistributedSampler` because Lightning would deal any other one out in an
    order of its own.

    The order depends on the lengths, the seed and the number of the epoch alone, so that a resumed run repeats it.

    Args:
        lengths: Tokens of each text.
        batch_size: Texts of one batch on each rank.
        seed: Of the order.
        epoch: Gives the number of the epoch.
        ranks: That share the texts; where they do not come out even, the first ones are repeated.
        rank: Whose share it is.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        epoch: Callable[[], int] | int = 0,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas=ranks, rank=rank, shuffle=False, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.global_batch = batch_size * ranks
        self.number_of_epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch."""
        dealt = islice(cycle(self._order()), self.total_size)
        return islice(dealt, self.rank, None, self.num_replicas)

    def _order(self) -> list[int]:
        epoch = self.number_of_epoch if isinstance(self.number_of_epoch, int) else self.number_of_epoch()
        draw, step = random.Random(f"{self.seed} {epoch} order"), self.global_batch
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        pools = [order[i : i + step * POOL] for i in range(0, len(order), step * POOL)]
        together = [index for pool in pools for index in sorted(pool, key=self.lengths.__getitem__)]
        batches = [together[i : i + step] for i in range(0, len(together), step)]
        # One that is not full comes last: a loader cuts the order into batches wherever they began.
        last = [batches.pop()] if len(batches[-1]) < step else []
        draw.shuffle(batches)
        return [index for batch in (*batches, *last) for index in batch]


def lengths_of(dataset: Sequence[Any]) -> list[int]:
    """Tokens of each item of a data set."""
    known = getattr(dataset, "lengths", None)  # of a stream, which would read every row again
    return list(known) if known is not None else [len(dataset[index]) for index in range(len(dataset))]


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Share of the places in a batch that hold no token, over all batches of an order; places are computed all alike.

    Args:
        lengths: Tokens of each text.
        order: Their indices.
        batch_size: Texts of one batch.
    """
    batches = [[lengths[i] for i in order[begin : begin + batch_size]] for begin in range(0, len(order), batch_size)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)
