"""Stopping in order: a signal reaches the command, and the command tells the ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_hybrid.callbacks.interruption import INTERRUPTED
from lightning_hybrid.callbacks.signals import SignalWatch
from lightning_hybrid.clusters.beginning import Mark

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """What the command and rank 0 know of a run that is to end: a file beside the run's mark.

    Args:
        mark: of the run.
    """

    def __init__(self, mark: Mark) -> None:
        self._mark = mark
        self._path = mark.path.with_suffix(".stop")
        self._watch = SignalWatch(SIGNALS, lambda: "the ranks finish what they do", _end_command, KeyboardInterrupt)

    # ---- in the command ----------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note signals in a block, as far as it runs in the main thread."""
        self._watch.remember()
        self._watch.install()
        try:
            yield
        finally:
            self._watch.remove()

    @property
    def exit_code(self) -> int | None:
        """That the command ends with when the ranks have; None where nobody asked for their end."""
        asked = self._watch.received
        return (INTERRUPTED if signal.SIGINT in asked else 0) if asked else None

    def pass_on(self) -> None:
        """Tell the ranks what was asked.

        Raises:
            KeyboardInterrupt: where they have not begun, or have another folder, and would not hear it.
        """
        asked = " ".join(sorted(number.name for number in self._watch.received))
        if not asked or (self._path.exists() and self._path.read_text() == asked):
            return
        if not self._mark.path.exists():
            raise KeyboardInterrupt
        new = self._path.with_suffix(".stop-new")
        new.write_text(asked)
        new.replace(self._path)

    def forget(self) -> None:
        """Leave no file."""
        self._path.unlink(missing_ok=True)

    # ---- in rank 0 ---------------------------------------------------------------------------------------------------

    def asked(self) -> set[signal.Signals]:
        """The signals that the command was sent."""
        try:
            return {signal.Signals[name] for name in self._path.read_text().split()}
        except FileNotFoundError:
            return set()


def _end_command() -> None:
    """At the second signal, also SIGTERM: through the blocks that end what was started."""
    raise KeyboardInterrupt
