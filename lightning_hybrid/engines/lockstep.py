"""Ranks that generate together: none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from lightning_hybrid.containers import Shard
from lightning_hybrid.errors import RolloutError

T = TypeVar("T")
IDLE, WORKING, FAILED = range(3)


class AnotherRankFailedError(RolloutError):
    """Another rank failed, and says why itself."""

    def __init__(self) -> None:
        super().__init__("another rank failed while ranks generate together, and says why; this one stops with it")


class LockStep:
    """Agreements of all ranks; alone, or where ranks do not need each other, each goes its own way.

    Args:
        together: whether the ranks fetch weights together.
    """

    def __init__(self, together: bool) -> None:
        self.together = together and torch.distributed.get_world_size() > 1

    def all(self, act: Callable[[], T]) -> T:
        """What ``act`` returns; where it fails on one rank, every rank raises.

        Raises:
            AnotherRankFailedError: on ranks that did not fail themselves.
        """
        if not self.together:
            return act()
        try:
            result = act()
        except Exception:
            self._worst(FAILED)
            raise
        if self._worst(WORKING) == FAILED:
            raise AnotherRankFailedError
        return result

    def any(self, working: bool) -> bool:
        """Whether any rank still has work; asked before every pass over weights that are fetched for it.

        Raises:
            AnotherRankFailedError: if a rank said that it failed.
        """
        if not self.together:
            return working
        state = self._worst(WORKING if working else IDLE)
        if state == FAILED:
            raise AnotherRankFailedError
        return state == WORKING

    def failed(self) -> None:
        """Tell ranks that ask :meth:`any` next."""
        if self.together:
            self._worst(FAILED)

    @staticmethod
    def _worst(state: int) -> int:
        return reduced(state, torch.distributed.ReduceOp.MAX)


def least(number: int, shard: Shard) -> int:
    """The smallest number that a rank of the group has."""
    return number if shard.size == 1 else reduced(number, torch.distributed.ReduceOp.MIN, shard.group)


def reduced(number: int, how: torch.distributed.ReduceOp.RedOpType, group: object = None) -> int:
    """A number of each rank, reduced."""
    held = torch.tensor(number, device=get_accelerator().current_device_name())
    torch.distributed.all_reduce(held, how, group=group)
    return int(held)
