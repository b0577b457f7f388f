"""Which phase of an iteration is running, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Name and time the phases of an iteration.

    Example::

        with phases("rollout"):
            ...
        phases.seconds["rollout"]
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.listeners: list[Callable[[str], None]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Run a block as the phase ``name``; its seconds replace those of the previous iteration."""
        for listener in self.listeners:
            listener(name)
        begin = _now()
        try:
            yield
        finally:
            self.seconds[name] = _now() - begin


def _now() -> float:
    """Seconds, after the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
