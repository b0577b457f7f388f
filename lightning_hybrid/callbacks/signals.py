"""Signals that are noted, and acted upon later."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None

Source = Callable[[], set[signal.Signals]]
_source: Source | None = None

# Launchers such as torchrun pass a signal on to processes that had it from the terminal: both are one.
SAME_SECONDS = 1.0
STOPPING = (signal.SIGTERM, signal.SIGINT)


def hear_from(source: Source | None) -> None:
    """Have every watch of this process also hear of signals that arrived elsewhere; None: only its own.

    Args:
        source: which those are; it is asked again and again, at no cost.
    """
    global _source
    _source = source


class SignalWatch:
    """Note which signals arrive; a second one that asks to stop is answered at once.

    Handlers note and say so in one line, and do nothing else: anything more, such as talking to other ranks, could
    interrupt the very same thing.

    Args:
        signals: to watch.
        describe: what will happen now, for the line.
        at_once: called for a second SIGTERM or SIGINT, when the handlers from before are back; then SIGTERM ends the
            process, and SIGINT raises ``interrupt``.
        interrupt: what a second SIGINT raises.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals],
        describe: Callable[[], str],
        at_once: Callable[[], None],
        interrupt: Callable[[], BaseException],
    ) -> None:
        self.signals = tuple(signals)
        self._noted: set[signal.Signals] = set()
        self._describe, self._at_once, self._interrupt = describe, at_once, interrupt
        self._before: dict[signal.Signals, Handler] = {}
        self._installed = False
        self._stopping_since = 0.0

    @property
    def received(self) -> set[signal.Signals]:
        """What has arrived."""
        return self._noted if _source is None else self._noted | (_source() & {*self.signals})

    def remember(self) -> None:
        """What is there now is to be put back."""
        self._before = {number: signal.getsignal(number) for number in self.signals}

    def install(self) -> bool:
        """Begin to watch; False where Python does not let this thread do so, and nobody else tells of signals."""
        if threading.current_thread() is not threading.main_thread():
            return _source is not None
        for number in self.signals:
            signal.signal(number, self._note)
        self._installed = True
        return True

    def remove(self) -> None:
        """Put back the handlers from before."""
        if not self._installed:
            return
        self._installed = False
        for number, handler in self._before.items():
            # None is a handler that was not installed from Python, and that Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        caught, now = signal.Signals(number), time.monotonic()
        if caught in STOPPING and self._stopping_since:
            if now - self._stopping_since > SAME_SECONDS:
                self._stop(caught)
            return
        if caught in STOPPING:
            self._stopping_since = now
        self._noted.add(caught)
        say(f"{caught.name}: {self._describe()}{'; once more to stop at once' if caught in STOPPING else ''}")

    def _stop(self, caught: signal.Signals) -> None:
        say(f"{caught.name}: stopping at once")
        self.remove()
        self._at_once()
        if caught == signal.SIGINT:
            raise self._interrupt()
        signal.signal(caught, signal.SIG_DFL)
        os.kill(os.getpid(), caught)


def say(line: str) -> None:
    """One line to stderr, also from within a signal handler, where Python's own stream may be in use."""
    os.write(2, f"{line}\n".encode())
