"""What ranks print, on its way to the terminal of the command."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

SECONDS = 5.0  # between two lines of a bar
# What Ray writes before each line of a process of the run.
_PREFIX = re.compile(r"^\((?:RayTrainWorker|ServerActor) pid=\d+(?:, ip=[^)]*)?\) ")
# Ray Train on its own housekeeping, which its logs keep; where it fails, it raises.
_HOUSEKEEPING = re.compile(r"^\((?:TrainController|PlacementGroupCleaner|PreemptionWatcher|SynchronizationActor) pid=")


class Lines:
    """A stream that gets whole lines only: of a bar that is drawn over itself, its state every few seconds.

    Args:
        stream: what is written to in the end.
        seconds: between two lines of a bar.
    """

    def __init__(self, stream: TextIO, seconds: float = SECONDS) -> None:
        self._stream, self._seconds = stream, seconds
        self._drawn, self._said, self._said_at = "", "", -seconds
        self._open = False

    def write(self, text: str) -> int:
        """Pass on what is no bar, and of a bar what is due."""
        if "\r" not in text:
            self._end_bar(text)
        else:
            self._draw(text.rpartition("\r")[2])
        return len(text)

    def _draw(self, state: str) -> None:
        self._open = True
        self._drawn = state.strip() or self._drawn
        if self._drawn and time.monotonic() - self._said_at >= self._seconds:
            self._say()

    def _end_bar(self, text: str) -> None:
        if self._open and text:
            self._say()
            self._open = False
            text = text.removeprefix("\n")  # with which a bar ends
        self._stream.write(text)

    def _say(self) -> None:
        if self._drawn not in ("", self._said):
            self._stream.write(f"{self._drawn}\n")
        self._drawn, self._said, self._said_at = "", self._drawn or self._said, time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _WithoutPrefix:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        if _HOUSEKEEPING.match(text):
            self._dropped = True
        elif text != "\n" or not self._dropped:  # `print` writes the end of a line by itself
            self._dropped = False
            self._stream.write(_PREFIX.sub("", text))
            self._stream.flush()  # into a file, too, lines come as they are said
        else:
            self._dropped = False
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def without_prefixes() -> Iterator[None]:
    """Show for a block what ranks print as if they printed it here."""
    with _printing_through(_WithoutPrefix):
        yield


@contextmanager
def progress_in_lines() -> Iterator[None]:
    """Ray passes on whole lines: for a block, a bar that is drawn over itself becomes a line now and then."""
    with _printing_through(Lines):
        yield


@contextmanager
def _printing_through(kind: Callable[[TextIO], Any]) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(kind, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
