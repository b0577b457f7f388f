"""Where an iteration of a hybrid engine spends its time."""

from __future__ import annotations

import time


class PhaseClock:
    """Seconds spent generating, gathering and training between one ``eval()`` and the next.

    The figures are those DeepSpeed's hybrid engine prints, kept as numbers: :meth:`metrics` returns the last finished
    iteration's.
    """

    def __init__(self) -> None:
        self._begin: float | None = None
        self._training_since: float | None = None
        self._gather = self._generate = self._training = 0.0
        self._samples = 0
        self._last: dict[str, float] = {}

    def add_generation(self, samples: int, gather: float, generate: float) -> None:
        """Record one call of ``generate``: local samples, seconds of gathering and of generating."""
        self._samples += samples
        self._gather += gather
        self._generate += generate

    def start_training(self) -> None:
        """Training begins now."""
        self._training_since = time.perf_counter()

    def add_training(self) -> None:
        """Count the time since training began, or since the last call, as training."""
        if self._training_since is not None:
            now = time.perf_counter()
            self._training += now - self._training_since
            self._training_since = now

    def end_iteration(self) -> None:
        """Close the iteration that the previous call opened, and open the next."""
        now = time.perf_counter()
        if self._begin is not None and self._generate > 0:
            total = now - self._begin
            self._last = {
                "end_to_end_seconds": total,
                "gather_seconds": self._gather,
                "generate_seconds": self._generate,
                "training_seconds": self._training,
                "other_seconds": total - self._gather - self._generate - self._training,
                "samples_per_second": self._samples / total,
            }
        self._begin, self._training_since, self._samples = now, None, 0
        self._gather = self._generate = self._training = 0.0

    def metrics(self) -> dict[str, float]:
        """Seconds of the last finished iteration by phase, and this rank's samples per second; empty at first."""
        return dict(self._last)
