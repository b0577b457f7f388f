"""Batches of texts of like length: less padding, and ranks that take equally long."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from lightning_hybrid.data.dealing import DealtOrder

POOL = 32  # batches whose texts are sorted among themselves: the rest of the order stays random


class LikeLengths(DealtOrder):
    """An order in which texts of like length stand together, drawn anew in each epoch, and one rank's share of it.

    All texts are shuffled and cut into pools; each pool is sorted by length and cut into global batches; the global
    batches of all pools are shuffled. So the batches of all ranks in one step are of like length too.

    Args:
        lengths: Tokens of each text.
        batch_size: Texts of one batch on each rank.
        seed: As all others: see `DealtOrder`.
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
        super().__init__(len(lengths), seed, epoch, ranks, rank)
        self.lengths = lengths
        self.global_batch = batch_size * ranks

    def order(self, epoch: int) -> list[int]:
        """The indices of one epoch, for all ranks together."""
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


def lengths_of(dataset: Any) -> list[int]:
    """Tokens of each item of a data set."""
    if hasattr(dataset, "parts"):
        return [length for part in dataset.parts for length in lengths_of(part)]
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
