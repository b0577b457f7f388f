"""Judging hostile text in a process of its own, which is ended where it takes too long."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import IO, Any, Literal

from lightning_hybrid.errors import RewardError

START_SECONDS = 120.0  # importing SymPy takes one or two; on a machine that is busy starting ranks, more
PROCESS = Path(__file__).with_name("judge_process.py")


class NotJudged(Exception):
    """A question without an answer; the text says why."""


class Judge:
    """A process that answers questions about responses, started with the first and again after each that it fails at.

    A signal or a thread could not end what a response makes Python compute, such as a power of powers or a regular
    expression that tries all ways: both keep the interpreter to themselves until they are done.

    Args:
        kind: what it is asked.
    """

    def __init__(self, kind: Literal["math", "format"]) -> None:
        self.kind = kind
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._end: Any = None

    def ask(self, question: dict[str, str], seconds: float) -> bool | None:
        """Put a question.

        Args:
            question: what the process expects.
            seconds: how long the answer may take.

        Returns:
            Yes, no, or None where the right answer itself cannot be read.

        Raises:
            NotJudged: No answer in time, or the process failed at it.
            RewardError: The process cannot be started.
        """
        process = self._started()
        try:
            line = json.dumps({**question, "seconds": seconds}).encode() + b"\n"
            answer = self._exchange(process, line, seconds)
        except BaseException:  # also an interrupt, whose answer would be taken for that of the next question
            self.stop()
            raise
        if "failed" in answer:
            raise NotJudged(answer["failed"])
        right: bool | None = answer["right"]
        return right

    def stop(self) -> None:
        """End the process; the next question starts another."""
        if self._end is not None:
            self._end()
        self._process, self._end, self._unread = None, None, b""

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        # -P: its folder holds modules whose names others may have, too.
        command = [sys.executable, "-P", str(PROCESS), self.kind]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process, self._end = process, weakref.finalize(self, _end, process)
        try:
            self._exchange(process, b"", START_SECONDS)
        except NotJudged as error:
            self.stop()
            raise RewardError(
                f"the process that verifies responses could not be started ({error}): to see why, run "
                f"{' '.join(command)!r}"
            ) from error
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, Any]:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError as error:
            raise NotJudged(f"the process ended with code {process.wait()}") from error
        answer: dict[str, Any] = json.loads(self._line(process, time.monotonic() + seconds, seconds))
        return answer

    def _line(self, process: subprocess.Popen[bytes], deadline: float, seconds: float) -> bytes:
        assert process.stdout is not None
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())
            if not _readable(process.stdout, left):
                raise NotJudged(f"no answer within {seconds:g} seconds")
            read = os.read(process.stdout.fileno(), 2**16)
            if not read:
                raise NotJudged(f"the process ended with code {process.wait()}")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "_process": None, "_unread": b"", "_end": None}  # a copy starts its own


def _readable(pipe: IO[bytes], seconds: float) -> bool:
    # Not `select.select`, which knows the first 1,024 descriptors only.
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # what was still to be sent to it
                continue
