"""An order of an epoch of its own, dealt out to the ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice

from torch.utils.data import DistributedSampler


class DealtOrder(DistributedSampler[int]):
    """The indices of an epoch in an order that the seed and the number of the epoch decide, and one rank's share of it.

    The order is dealt out to the ranks one index at a time, so that the batches of all ranks together are those of one
    rank with batches as large. It is a `DistributedSampler` because Lightning would shuffle any other one anew before
    it deals it out. A run that goes on in the middle of an epoch repeats the order.

    Args:
        count: Indices of an epoch.
        seed: Of the order.
        epoch: Gives the number of the epoch.
        ranks: That share the order; where it does not come out even, its first indices are repeated.
        rank: Whose share it is.
    """

    def __init__(
        self, count: int, seed: int, epoch: Callable[[], int] | int = 0, ranks: int = 1, rank: int = 0
    ) -> None:
        super().__init__(range(count), num_replicas=ranks, rank=rank, shuffle=False, seed=seed)  # type: ignore[arg-type]
        self.count = count
        self.number_of_epoch = epoch

    @abstractmethod
    def order(self, epoch: int) -> Sequence[int]:
        """The indices of one epoch, for all ranks together."""

    def __iter__(self) -> Iterator[int]:
        """This rank's indices of the epoch that begins."""
        epoch = self.number_of_epoch if isinstance(self.number_of_epoch, int) else self.number_of_epoch()
        dealt = islice(cycle(self.order(epoch)), self.total_size)
        return islice(dealt, self.rank, None, self.num_replicas)
