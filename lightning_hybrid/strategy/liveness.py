"""Who is alive, who died, hangs or stopped, and why: no rank waits for another beyond a stated time without a word."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch.distributed

from lightning_hybrid.engines.memory import out_of_memory_in
from lightning_hybrid.errors import RankLostError
from lightning_hybrid.strategy.beats import INTERVAL, Beat, Beats, Heard

SILENCE = 5.0  # seconds without a beat, after which a rank counts as silent when a collective has failed
PATIENCE = SILENCE + 2 * INTERVAL  # seconds for which a reason is looked for
GRACE = 5.0  # seconds for the main thread to end by its own error, before the process is ended under it
FAREWELL = 30.0  # seconds for the last beat of a run that went well: its thread must not outlive the interpreter
WARNING = 60.0  # seconds of silence that are worth a word
WATCHED = 8  # ranks that one rank listens to continuously; a large run is watched in a ring
LONGEST = 2000  # characters of last words
SHOWN = 8  # ranks listed in a message
HOST = socket.gethostname()
EXIT_CODE = 75  # of a process that is ended because it would wait for a lost rank for ever

# How gloo and NCCL word that another rank did not answer; what a program does wrong they raise by the same types.
SIGNS = (
    "gloo/transport",
    "connection closed by",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "pair closure",
    "timed out waiting",
    "operation timed out",
    "failed or timed out",
    "wait timeout",
    "socket timeout",
    "collective operation timeout",
    "communicator was aborted",
    "remote process exited",
    "ncclremoteerror",
)
MISUSE = "enforce fail"  # gloo, also in its transport, of tensors that do not fit


class Liveness:
    """This rank's beats, what it hears of the others, and what it makes of a collective that fails.

    A thread of its own watches: when a rank has not been heard of for ``timeout``, it writes the reason to stderr and,
    if the main thread does not end by an error of its own within :data:`GRACE`, ends the process with exit code
    :data:`EXIT_CODE`. So a hang ends also inside code that has no timeout. When this rank itself has done one thing for
    longer than ``timeout``, it says where the others are: NCCL may end the process next, and does not say that.

    Args:
        rank: of this process.
        world_size: of the run, at least 2.
        timeout: seconds that a rank may be silent.
        step: ``trainer.global_step``, asked when something is said.
        exits: by rank, how processes that this one started have ended.

    Attributes:
        timeout: as given.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        step: Callable[[], int],
        exits: Mapping[int, str] | None = None,
    ) -> None:
        self.rank = rank
        self.timeout = timeout
        self._step = step
        self._exits = {} if exits is None else exits
        self._attention = 0.0
        self._doing = ("starting", time.monotonic())
        self._depth = 0
        self._spoke_at = 0.0
        self._words: str | None = None
        self._follows = False
        self._left = False
        self._stop = threading.Event()
        watched = [(rank + i) % world_size for i in range(1, min(WATCHED + 1, world_size))]
        self._beats = Beats(rank, watched, world_size, self._describe, lambda: self._attention)
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="watch over ranks")

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._beats.start()
        self._watcher.start()

    def stop(self) -> None:
        """Say farewell and end both threads; after an error, leave the others a moment to hear why."""
        if self._words is not None:
            time.sleep(2 * INTERVAL)
        self._left = True
        self._stop.set()
        self._beats.now(patience=2 * INTERVAL)
        # One that the store answers while Python ends aborts the process, which had done all; one that it never answers
        # is a daemon, and ends with the process.
        patience = FAREWELL if self._words is None else INTERVAL
        for thread in (self._beats, self._watcher):
            thread.join(timeout=patience)

    # ---- what this rank says ---------------------------------------------------------------------------------------

    def say(self, doing: str) -> None:
        """Tell the others what this rank does from now on."""
        self._doing = (f"{doing}, step {self._step()}", time.monotonic())

    @contextmanager
    def doing(self, what: str | None) -> Iterator[None]:
        """Say ``what`` for a block, what was said before again after it, and last words where it raises.

        Raises:
            RankLostError: in place of the error of a collective; names the lost rank and the reason.
        """
        before = self._doing
        if self._depth == 0 and sys.exception() is None:
            self._words = None  # the error that was spoken of was dealt with
        if what is not None:
            self.say(what)
        self._depth += 1
        try:
            yield
        except BaseException as error:
            lost = self.lost_rank_behind(error)
            self.last_words(lost or error)
            if lost is not None:
                raise lost from error
            raise
        finally:
            self._depth -= 1
        if what is not None:
            self._doing = before if self._depth else (f"after {self._doing[0]}", time.monotonic())

    def last_words(self, error: BaseException) -> None:
        """Tell the others why this rank stops; an error that passes by again is told once."""
        words = f"{type(error).__name__}: {error}"[:LONGEST]
        if words != self._words:
            self._follows, self._words = isinstance(error, RankLostError), words
            self._spoke_at = self._attention
            self._beats.now(patience=2 * INTERVAL)

    def _describe(self, count: int) -> Beat:
        doing, since = self._doing
        return Beat(count, doing, time.monotonic() - since, self._words, self._follows, self._left, HOST)

    # ---- why a collective failed -----------------------------------------------------------------------------------

    def lost_rank_behind(self, error: BaseException) -> RankLostError | None:
        """The loss of a rank that made a collective fail with ``error``; None if ``error`` is no such failure.

        Listens for a few seconds: a rank that died is known by the beats that do not come.
        """
        if not is_failed_collective(error):
            return None
        reason = self._reason()
        doing, _ = self._doing
        return RankLostError(f"rank {self.rank} ({doing}) lost another rank: {reason}")

    def _reason(self) -> str:
        self._beats.listen_to_all()
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self._beats.now(patience=INTERVAL)
            found = self._stopped() or self._unconnected() or self._silent(SILENCE) or self._stopped(follows=True)
            if found:
                return found
            time.sleep(0.2)
        return self._everybody()

    def _stopped(self, follows: bool = False) -> str:
        """Ranks that said why they stop, or whose process ended."""
        heard = sorted(self._beats.heard.items())
        told = {rank: h.beat.words for rank, h in heard if h.beat.words and h.beat.follows == follows}
        said = {rank: f"rank {rank} stopped: {words}" for rank, words in told.items()}
        ended = {rank: f"rank {rank} {how}" for rank, how in sorted(self._exits.items()) if rank not in said}
        return _listed([*said.values(), *({} if follows else ended).values()])

    def _unconnected(self) -> str:
        """The rank that holds the store, once the connection to it has broken."""
        failure = self._beats.failure
        return "" if failure is None else self._without_store(f"cannot be reached ({str(failure)[:LONGEST]})")

    def _silent(self, seconds: float) -> str:
        """Ranks not heard of for so long, or the store, which all of them beat into."""
        asleep = self._attention - self._beats.answered_at
        if asleep >= seconds:
            return self._without_store(f"has not answered for {asleep:.0f} s")
        silent = {r: h for r, h in sorted(self._beats.heard.items()) if self._age(h) >= seconds and not _done(h.beat)}
        return _listed(
            [
                _absence(rank, heard.beat, f"has not been heard of for {self._age(heard):.0f} s")
                for rank, heard in silent.items()
            ]
        )

    def _without_store(self, how: str) -> str:
        zero = self._beats.heard.get(0)
        if zero is None:
            return f"rank 0 is gone: the store, which it or its launcher holds, {how}: killed, stopped or cut off"
        return (
            ""
            if _done(zero.beat)
            else _absence(0, zero.beat, f"is gone: the store, which it or its launcher holds, {how}")
        )

    def _age(self, heard: Heard) -> float:
        """Seconds for which the store answered and a rank's beat did not change."""
        return self._beats.answered_at - heard.at

    def _everybody(self) -> str:
        """Where all others are, when none is lost: first those that are elsewhere than this rank, and for longest."""
        own = self._doing[0].split(",")[0]
        heard = sorted(
            self._beats.heard.items(), key=lambda item: (item[1].beat.doing.startswith(own), -item[1].beat.seconds)
        )
        return _listed(
            [
                f"rank {rank} had already ended its run"
                if h.beat.left
                else f"rank {rank} is alive but has been in {h.beat.doing} for {h.beat.seconds:.0f} s"
                for rank, h in heard
            ]
        )

    # ---- the watching thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Count the seconds in which this process runs, so that its own stops are nobody's silence; judge each."""
        before, warned, told = time.monotonic(), "", self._doing
        while not self._stop.wait(INTERVAL / 2):
            now = time.monotonic()
            self._attention += min(now - before, INTERVAL)
            before = now
            silent = self._silent(min(WARNING, self.timeout / 2))
            if silent and not warned:
                write_to_stderr(f"rank {self.rank}: {silent}; this rank waits for {self.timeout:.0f} s")
            warned = silent
            doing = self._doing
            if self._depth and doing is not told and now - doing[1] > self.timeout:
                self._tell_where_others_are(*doing)
                told = doing
            # A main thread that is already on its way out has as long again for it.
            if self._attention - self._spoke_at >= self.timeout and (reason := self._silent(self.timeout)):
                self._end(reason)

    def _tell_where_others_are(self, doing: str, since: float) -> None:
        write_to_stderr(
            f"rank {self.rank} has been in {doing} for {time.monotonic() - since:.0f} s, longer than the timeout of "
            f"{self.timeout:.0f} s: {self._silent(SILENCE) or self._everybody()}"
        )

    def _end(self, reason: str) -> None:
        write_to_stderr(f"rank {self.rank} ({self._doing[0]}) waited for {self.timeout:.0f} s: {reason}")
        spoke_at = self._spoke_at
        if not self._stop.wait(GRACE) and self._spoke_at == spoke_at:
            os._exit(EXIT_CODE)


def is_failed_collective(error: BaseException) -> bool:
    """Whether torch, gloo or NCCL raised it because other ranks did not answer; never one of a module's own errors."""
    if out_of_memory_in(error) is not None:
        return False
    if isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistStoreError):
        return True
    text = str(error).lower()
    collective = type(error) is RuntimeError or isinstance(error, torch.distributed.DistBackendError)
    return collective and MISUSE not in text and any(sign in text for sign in SIGNS)


def _done(beat: Beat) -> bool:
    """Whether the rank ended its run as it should, so that nobody misses it."""
    return beat.left and beat.words is None


def _absence(rank: int, beat: Beat, how: str) -> str:
    if beat.words is not None:
        return f"rank {rank} stopped: {beat.words}"
    elsewhere = f" on {beat.host}" if beat.host not in ("", HOST) else ""
    return f"rank {rank} {how}; it was last in {beat.doing}{elsewhere}: killed, stopped or cut off"


def _listed(sentences: list[str]) -> str:
    more = f"; and {len(sentences) - SHOWN} more" if len(sentences) > SHOWN else ""
    return "; ".join(sentences[:SHOWN]) + more


def write_to_stderr(text: str) -> None:
    """Past all buffers and locks, which a hanging main thread may hold."""
    with suppress(OSError):  # a terminal that was closed must not end the thread that watches
        os.write(2, f"lightning-hybrid: {text}\n".encode())
