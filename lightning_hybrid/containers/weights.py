"""Where a container finds the values of a parameter, and which share of them is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Cut(NamedTuple):
    """Indices ``begin`` to ``end`` along dimension ``dim``."""

    dim: int
    begin: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """The cut of ``tensor``, a view."""
        return tensor.narrow(self.dim, self.begin, self.end - self.begin)


class Weights(Protocol):
    """Parameters' values, by unit: 0 is the embedding, 1 to ``layers`` a layer each, the last the norm and the head.

    Attributes:
        lasting: the values stay at their addresses from call to call.
        steady: all values stay readable for the whole call; :meth:`fetch` does nothing.
    """

    lasting: bool
    steady: bool

    def of(self, parameter: nn.Parameter, unit: int, cut: Cut | None = None) -> Tensor:
        """A parameter's values or a cut of them, at an address that stays; readable once the unit is fetched."""
        ...

    def fetch(self, unit: int) -> None:
        """Make a unit's values readable. Called by all ranks in the same order."""
        ...


class InPlace:
    """Values where the optimizer updates them: nothing is copied, nothing to fetch."""

    lasting = True
    steady = True

    def of(self, parameter: nn.Parameter, unit: int, cut: Cut | None = None) -> Tensor:
        """The parameter itself, or a view of it."""
        return parameter.detach() if cut is None else cut.of(parameter.detach())

    def fetch(self, unit: int) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Shard:
    """One rank's share of the heads, the MLP's width and the vocabulary (Shoeybi et al. 2019, Megatron-LM).

    Attributes:
        rank: of this process in the group.
        size: ranks in the group; 1 for no sharing.
        group: the process group.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def bounds(self, total: int) -> tuple[int, int]:
        """First and one-past-last index of this rank's share of ``total``."""
        return total * self.rank // self.size, total * (self.rank + 1) // self.size

    def sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the group, the same bits on every rank."""
        if self.size > 1:
            x = x.contiguous()
            torch.distributed.all_reduce(x, group=self.group)
        return x

    def join(self, x: Tensor, total: int) -> Tensor:
        """Put the ranks' shares ``[rows, share]`` of ``total`` columns side by side, ``[rows, total]``."""
        if self.size == 1:
            return x
        widest = -(-total // self.size)
        padded = x.new_zeros(len(x), widest)
        padded[:, : x.shape[1]] = x
        shares = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(shares, padded, group=self.group)
        bounds = [Shard(rank, self.size).bounds(total) for rank in range(self.size)]
        return torch.cat([share[:, : end - begin] for share, (begin, end) in zip(shares, bounds, strict=True)], 1)
