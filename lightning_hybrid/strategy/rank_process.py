"""A rank in a process of its own, seen from the notebook that started it; ``rank_main`` is what runs in it."""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import IO, Any, TextIO

from lightning_hybrid.errors import RankLostError, StrategyError
from lightning_hybrid.strategy.launcher import GRACE, how_it_ended
from lightning_hybrid.strategy.messages import Call, Failed, Stopped

INTERVAL = 0.2

# An interrupt before Python is ready ends the process without a word.
CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from lightning_hybrid.strategy.rank_main import main; main(int(sys.argv[2]), sys.argv[3])"
)


class RankTraceback(Exception):
    """Where in a rank an error was raised: the cause of the one that is raised in the notebook."""


class RankProcess:
    """Start a rank, show what it prints, do what it asks for.

    It is in a session of its own, so that a signal to the notebook's kernel does not reach it past :meth:`signal`, and
    ends when the kernel does.

    Args:
        rank: its number.
        folder: with the job, and for the results.
        environment: variables beside those that are set here.
    """

    def __init__(self, rank: int, folder: Path, environment: Mapping[str, str]) -> None:
        self.rank = rank
        self.failure: Failed | None = None
        self.stopped = False
        self._messages, theirs = Pipe(duplex=False)
        command = [sys.executable, "-c", CODE, json.dumps(sys.path), str(theirs.fileno()), str(folder)]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg", **environment},
            stdin=subprocess.PIPE,  # the rank ends when it closes
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._streams = {
            self._process.stdout: Stream(self._process.stdout, "stdout"),
            self._process.stderr: Stream(self._process.stderr, "stderr"),
        }
        self.sources: list[Any] = [*self._streams, self._messages]

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    @property
    def error(self) -> BaseException | None:
        """What ended it, other than its job and a request to stop; None while it runs."""
        if self.failure is not None:
            return self.failure.error()
        if self.running or self.stopped or self._process.returncode == 0:
            return None
        return RankLostError(f"rank {self.rank} {how_it_ended(self._process.returncode)}")

    @property
    def follows(self) -> bool:
        """Whether its error is itself the loss of another rank."""
        return self.failure is not None and self.failure.follows

    def receive(self, source: Any) -> None:
        """Take what a source has, and forget one that is at its end."""
        receive = self._receive_message if source is self._messages else self._streams[source].show
        if not receive():
            self.sources.remove(source)

    def _receive_message(self) -> bool:
        try:
            message = self._messages.recv()
        except EOFError:
            return False
        if isinstance(message, Call):
            message()
        elif isinstance(message, Failed):
            self.failure = message
        else:
            assert isinstance(message, Stopped)
            self.stopped = True
        return True

    def signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        self._process.send_signal(number)

    def end(self) -> None:
        """End it, and what it started, at once; let go of what connects to it."""
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, *self._streams, self._messages):
            assert stream is not None
            stream.close()


class Stream:
    """What a rank writes to a stream, shown on the notebook's own stream of that name.

    Args:
        pipe: to read from.
        name: ``stdout`` or ``stderr``.
    """

    def __init__(self, pipe: IO[bytes], name: str) -> None:
        self._pipe, self._name = pipe, name
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def show(self) -> bool:
        """Show what there is; False at the end."""
        data = os.read(self._pipe.fileno(), 1 << 16)
        target: TextIO = getattr(sys, self._name)  # as it is now: a cell may have redirected it
        target.write(self._decode(data, final=not data))
        target.flush()
        return bool(data)


def follow(ranks: Sequence[RankProcess], *, stopping: bool = False) -> None:
    """Show what ranks print and do what they ask for, until all have ended.

    After an error of one, the others have :data:`~lightning_hybrid.strategy.launcher.GRACE` to end by their own.

    Args:
        ranks: all of them.
        stopping: they were asked to stop: errors on their way are no news.

    Raises:
        BaseException: what the first rank to fail raised, unless that was the loss of another rank which says why.
        RankLostError: where a rank was killed, or ended without a reason.
        KeyboardInterrupt: if a rank stopped on request of somebody else.
    """
    deadline = float("inf")
    while any(rank.running for rank in ranks) and time.monotonic() < deadline:
        _receive(ranks, INTERVAL)
        if deadline == float("inf") and any(rank.error is not None for rank in ranks):
            deadline = time.monotonic() + GRACE
    while _receive(ranks, 0):
        pass
    if not stopping:
        _raise_for(ranks)


def _receive(ranks: Sequence[RankProcess], patience: float) -> bool:
    """Take what ranks have; False if there was nothing."""
    owners = {source: rank for rank in ranks for source in rank.sources}
    if not owners:
        time.sleep(patience)  # a rank that closes all its streams before it ends
    ready = wait(list(owners), timeout=patience) if owners else []
    for source in ready:
        owners[source].receive(source)
    return bool(ready)


def _raise_for(ranks: Sequence[RankProcess]) -> None:
    failed = [rank for rank in ranks if rank.error is not None]
    first = next((rank for rank in failed if not rank.follows), failed[0] if failed else None)
    if first is not None:
        error = first.error
        assert error is not None
        raise error from (RankTraceback(first.failure.traceback) if first.failure else None)
    if any(rank.stopped for rank in ranks):
        raise KeyboardInterrupt("the ranks were asked to stop")
    still = [rank.rank for rank in ranks if rank.running]
    if still:
        raise StrategyError(f"ranks {still} did not end")
