"""A data loader that can go on in the middle of an epoch, exactly where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.checkpoint.streams import capture_streams, generators_of, restore_generators, restore_streams
from lightning_hybrid.errors import CheckpointError

EPOCH, NOW = "epoch/", "now/"


@dataclass(frozen=True)
class Position:
    """Where in an epoch a run stands, and where its random streams stood there.

    Attributes:
        batches: of the epoch that are done.
        epoch: the streams when the epoch began, which decide its order.
        now: the streams before the next batch is fetched; empty where a process keeps its own.
        ended: the epoch is over, however many batches its loader has left.
    """

    batches: int
    epoch: dict[str, Tensor]
    now: dict[str, Tensor]
    ended: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """As one dictionary."""
        named = {f"{EPOCH}{key}": value for key, value in self.epoch.items()}
        named |= {f"{NOW}{key}": value for key, value in self.now.items()}
        return named | {"batches": torch.tensor([self.batches, self.ended])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Position:
        """What :meth:`tensors` returned."""
        parts = {
            prefix: {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in (EPOCH, NOW)
        }
        batches, ended = tensors["batches"].tolist()
        return cls(batches, parts[EPOCH], parts[NOW], bool(ended))


class ResumableLoader:
    """Iterate a data loader; know the position, and begin an epoch from one.

    To go on in the middle of an epoch, the epoch is begun with the random streams that it was begun with, and the
    batches that are done are fetched and dropped: whatever the data set and its workers draw is drawn again.

    Args:
        loader: a :class:`~torch.utils.data.DataLoader`; its attributes are this object's.
        is_boundary: whether a checkpoint may say that the run stands before the batch about to be fetched; False in the
            middle of an accumulation.
    """

    def __init__(self, loader: Any, is_boundary: Callable[[], bool] = lambda: True) -> None:
        self.loader = loader
        self._is_boundary = is_boundary
        self._resume: Position | None = None
        self._epoch: dict[str, Tensor] = {}
        self._fetched = 0
        self._boundary: Position | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    @property
    def worker_init_fn(self) -> Any:
        """The loader's, which Lightning sets."""
        return self.loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self.loader.worker_init_fn = function

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch, or go on with one; not before the first batch is asked for: what begins with it may draw."""
        resume, self._resume = self._resume, None
        if resume is not None and not resume.ended:
            yield from self._counted(self._resumed(resume))
            return
        if resume is not None and resume.now:
            restore_generators(resume.now, self._generators)
        self._epoch, self._fetched = capture_streams(self._generators), 0
        yield from self._counted(iter(self.loader))

    def _resumed(self, position: Position) -> Iterator[Any]:
        """The rest of an epoch."""
        self._epoch, self._fetched = position.epoch, position.batches
        own = capture_streams(self._generators)
        restore_streams(position.epoch, self._generators)
        batches: Iterator[Any] = iter(self.loader)
        for _ in range(position.batches):
            next(batches)
        restore_streams(position.now or own, self._generators)
        return batches

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._mark()
            batch = next(batches, self)
            if batch is self:
                return
            self._fetched += 1
            yield batch

    def _mark(self) -> None:
        if self._is_boundary():
            self._boundary = Position(self._fetched, self._epoch, capture_streams(self._generators))

    @property
    def _generators(self) -> list[torch.Generator]:
        return generators_of(self.loader)

    # ---- position ----------------------------------------------------------------------------------------------------

    def position(self, *, finished: bool, ended: bool = False) -> Position:
        """Where a checkpoint written now says that the run stands.

        Args:
            finished: nothing is in the middle: neither a batch nor an accumulation.
            ended: the epoch is over.
        """
        if finished:
            nothing_begun = not self._epoch
            return Position(self._fetched, self._epoch, capture_streams(self._generators), ended or nothing_begun)
        if self._boundary is None:
            raise CheckpointError("nothing to go on from: no batch has been fetched yet")
        return self._boundary

    def resume_at(self, position: Position) -> None:
        """Begin at a position; one at an epoch's end begins the epoch after it, from the process's own streams."""
        self._resume = position

    # Lightning takes a loader with these two for one that knows where it was, and leaves it alone.
    def state_dict(self) -> dict[str, int]:
        """Batches of the epoch that were fetched."""
        return {"batches": self._fetched}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to do: the strategy gives each rank its own position."""
