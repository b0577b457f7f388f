"""Real processes, as a user starts them: commands that end in time, or are ended whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, negative when it was killed, and what it wrote."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out[-4000:]}\n{self.err[-8000:]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: Sequence[str | Path], folder: Path, timeout: float, **environment: str) -> Ended:
    """Run one command in `folder`."""
    (ended,) = run_together(command, [environment], folder, timeout)
    return ended


def run_together(
    command: Sequence[str | Path], environments: Sequence[Mapping[str, str]], folder: Path, timeout: float
) -> list[Ended]:
    """Run the same command once in each environment, all at the same time, until all end, one fails or time is out."""
    processes = [_start(command, environment, folder / f"{i}") for i, environment in enumerate(environments)]
    deadline = time.monotonic() + timeout
    try:
        while None in (codes := [process.poll() for process in processes]):
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            _end(process)
    return [_read(process, folder / f"{i}") for i, process in enumerate(processes)]


def _start(command: Sequence[str | Path], environment: Mapping[str, str], files: Path) -> subprocess.Popen[bytes]:
    """Start in a session of its own, so that what it starts ends with it; files, because a full pipe would block."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with files.with_suffix(".out").open("wb") as out, files.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=files.parent,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started; after a success, ranks that it started may first come to their own end."""
    patience = time.monotonic() + (10 if process.returncode == 0 else 0)
    with suppress(ProcessLookupError):  # nothing of it is left
        while time.monotonic() < patience:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(process: subprocess.Popen[bytes], files: Path) -> Ended:
    return Ended(process.returncode, files.with_suffix(".out").read_text(), files.with_suffix(".err").read_text())
