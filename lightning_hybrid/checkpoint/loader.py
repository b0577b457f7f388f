"""A data loader that can go on in the middle of an epoch, exactly where it was, and show what comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.checkpoint.streams import capture_streams, generators_of, restore_generators, restore_streams
from lightning_hybrid.errors import CheckpointError

EPOCH, NOW, AHEAD = "epoch/", "now/", "ahead/"


@dataclass(frozen=True)
class Position:
    """Where in an epoch a run stands, and where its random streams stood there.

    Attributes:
        batches: of the epoch that are done.
        epoch: the streams when the epoch began, which decide its order.
        now: the streams before the next batch is fetched; empty where a process keeps its own.
        ended: the epoch is over, however many batches its loader has left.
        ahead: the streams before the next batch was fetched, where it was fetched ahead; empty where it was not.
    """

    batches: int
    epoch: dict[str, Tensor]
    now: dict[str, Tensor]
    ended: bool = False
    ahead: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """As one dictionary."""
        kept = {EPOCH: self.epoch, NOW: self.now, AHEAD: self.ahead}
        named = {f"{prefix}{key}": value for prefix, streams in kept.items() for key, value in streams.items()}
        return named | {"batches": torch.tensor([self.batches, self.ended])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Position:
        """What :meth:`tensors` returned."""
        parts = {
            prefix: {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in (EPOCH, NOW, AHEAD)
        }
        batches, ended = tensors["batches"].tolist()
        return cls(batches, parts[EPOCH], parts[NOW], bool(ended), parts[AHEAD])


_END = object()  # what no loader gives


@dataclass(frozen=True)
class _Ahead:
    """A batch that was fetched before its turn, and where the random streams stood before that."""

    batch: Any
    streams: dict[str, Tensor]


class ResumableLoader:
    """Iterate a data loader; know the position, and begin an epoch from one.

    To go on in the middle of an epoch, the epoch is begun with the random streams that it was begun with, and the
    batches that are done are fetched and dropped: whatever the data set and its workers draw is drawn again.

    Looking ahead, a batch is handed on once the one after it is fetched, too, which is :attr:`upcoming` then. The
    position counts what was handed on.

    Args:
        loader: a :class:`~torch.utils.data.DataLoader`; its attributes are this object's.
        is_boundary: whether a checkpoint may say that the run stands before the batch about to be fetched; False in the
            middle of an accumulation.
        look_ahead: fetch one batch ahead.
    """

    def __init__(
        self, loader: Any, is_boundary: Callable[[], bool] = lambda: True, *, look_ahead: bool = False
    ) -> None:
        self.loader = loader
        self.look_ahead = look_ahead
        self._is_boundary = is_boundary
        self._resume: Position | None = None
        self._epoch: dict[str, Tensor] = {}
        self._fetched = 0
        self._ahead: _Ahead | None = None
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
        resume, self._resume, self._ahead = self._resume, None, None
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
        if position.ahead:
            restore_streams(position.ahead, self._generators)
            self._fetch_ahead(batches)
        restore_streams(position.now or own, self._generators)
        return batches

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._mark()
            batch = self._next(batches)
            if batch is _END:
                return
            self._fetched += 1
            if self.look_ahead:
                self._fetch_ahead(batches)
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        ahead, self._ahead = self._ahead, None
        return next(batches, _END) if ahead is None else ahead.batch

    def _fetch_ahead(self, batches: Iterator[Any]) -> None:
        streams = capture_streams(self._generators)
        self._ahead = _Ahead(next(batches, _END), streams)

    @property
    def upcoming(self) -> Any | None:
        """The batch that comes after the one handed on last, looking ahead; None for none in this epoch."""
        return None if self._ahead is None or self._ahead.batch is _END else self._ahead.batch

    def _mark(self) -> None:
        if self._is_boundary():
            self._boundary = self._here()

    def _here(self, ended: bool = False) -> Position:
        ahead = {} if self._ahead is None else self._ahead.streams
        return Position(self._fetched, self._epoch, capture_streams(self._generators), ended, ahead)

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
            return self._here(ended or nothing_begun)
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
