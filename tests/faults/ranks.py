"""Two ranks as real processes, forked by a server that has imported everything."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LAUNCH_VARIABLES, ROOT
from tests.integration.processes import free_port

WORLD_SIZE = 2
START = 180.0  # seconds for everything imported, on a machine with much else to do


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code, negative when it was killed, what it wrote to stderr, and when, in epoch seconds."""

    rank: int
    code: int
    err: str
    at: float

    def __str__(self) -> str:
        return f"--- rank {self.rank}: exit code {self.code}\n{self.err[-6000:]}"


class ForkServer:
    """See :mod:`tests.faults.server`; ``log`` gets what the server itself has to say."""

    def __init__(self, log: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
        paths = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
        self.log = log
        with log.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.server"],
                env=environment,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )
        self._answer()

    def fork(self, target: str, arguments: dict[str, Any], env: dict[str, str], out: Path) -> int:
        """Start a process; its id."""
        order = {"target": target, "arguments": arguments, "env": env, "out": str(out)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        """End it, and with it all that it started."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server ended:\n{self.log.read_text()}"
        return json.loads(line)


class Ranks:
    """The ranks of one launch of a job; their files are in ``place``, numbered by launch."""

    def __init__(self, server: ForkServer, place: Path, target: str, arguments: dict[str, Any]) -> None:
        self.place = place
        for left in (*place.glob("pid-*"), *place.glob("began-*"), *place.glob("harm-*")):
            left.unlink()
        launch = len(list(place.glob("launch*-0.err")))
        self.outs = [place / f"launch{launch}-{rank}" for rank in range(WORLD_SIZE)]
        port = str(free_port())
        self.pids = []
        for rank, out in enumerate(self.outs):
            self.pids.append(server.fork(target, arguments, _environment(rank, port), out))

    def alive(self, rank: int) -> bool:
        return not Path(f"{self.outs[rank]}.exit").exists()

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to ranks, all of them by default."""
        for rank in ranks or range(WORLD_SIZE):
            if self.alive(rank):
                with suppress(ProcessLookupError):
                    os.kill(self.pids[rank], number)

    def await_files(self, *names: str, limit: float = 60.0) -> bool:
        """Until the run has left all these files; False if a rank ended before."""
        deadline = time.monotonic() + limit
        while not all((self.place / name).exists() for name in names):
            if not all(map(self.alive, range(WORLD_SIZE))):
                return all((self.place / name).exists() for name in names)
            if time.monotonic() > deadline:
                self._fail(f"no {' and '.join(names)} after {limit} s")
            time.sleep(0.01)
        return True

    def await_end(self, limit: float, *ranks: int) -> list[Ended]:
        """Until ranks have ended, all of them by default; fails with their stacks where one is late."""
        waited = ranks or tuple(range(WORLD_SIZE))
        deadline = time.monotonic() + limit
        while any(map(self.alive, waited)):
            if time.monotonic() > deadline:
                self._fail(f"{[rank for rank in waited if self.alive(rank)]} have not ended after {limit} s")
            time.sleep(0.02)
        return [self._ended(rank) for rank in waited]

    def end(self) -> None:
        """Whatever they are doing."""
        self.send(signal.SIGKILL)
        deadline = time.monotonic() + 10.0
        while any(map(self.alive, range(WORLD_SIZE))) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _ended(self, rank: int) -> Ended:
        code, at = json.loads(Path(f"{self.outs[rank]}.exit").read_text())
        return Ended(rank, code, self._err(rank), at)

    def _err(self, rank: int) -> str:
        written = Path(f"{self.outs[rank]}.err").read_text(errors="replace")
        return re.sub(r"^\[rank\d+\]: ", "", written, flags=re.MULTILINE)  # which torch adds to tracebacks

    def _fail(self, what: str) -> None:
        self.send(signal.SIGCONT)
        self.send(signal.SIGUSR2)  # which writes down where it stands
        time.sleep(0.5)
        written = "\n".join(f"--- rank {rank}:\n{self._err(rank)[-6000:]}" for rank in range(WORLD_SIZE))
        pytest.fail(f"{what}\n{written}", pytrace=False)


def _environment(rank: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
