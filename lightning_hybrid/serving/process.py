"""Starting the processes of roles beside this one, and ending them with it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.serving.addresses import LOOPBACK

START_SECONDS = 1800.0  # to load the largest model from the slowest disk
GRACE = 10.0  # seconds to end in order
LINES_KEPT = 30  # of stderr, for messages
OF_RANKS = {
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "CROSS_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"),
}


def is_of_ranks(variable: str) -> bool:
    """Whether a process that has this variable in its environment would take itself for one of the ranks."""
    return variable in OF_RANKS or variable.startswith("TORCHELASTIC_")


@dataclass(frozen=True)
class ServerSpec:
    """A process to start.

    Attributes:
        what: it is, for messages, such as ``vLLM engine 0``.
        module: that is run, whose body is :func:`~lightning_hybrid.serving.main_of`.
        settings: for it, as JSON can carry them.
        devices: CUDA indices, among those that the starter sees; none, or None for all that it sees.
        cpus: cores that it keeps busy, for who counts them.
        environment: variables beside the starter's.
    """

    what: str
    module: str
    settings: dict[str, Any]
    devices: tuple[int, ...] | None = None
    cpus: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)


class RunningServer(Protocol):
    """A process that answers.

    Attributes:
        url: where.
        token: for whom.
    """

    url: str
    token: str

    def exited(self) -> str | None:
        """How the process ended, and the last that it said; None while it runs."""
        ...

    def close(self) -> None:
        """End it; one that has ended is left alone."""
        ...


Starter = Callable[[Sequence[ServerSpec]], list[RunningServer]]
_starter: Starter | None = None
_started: list[RunningServer] = []


def use_starter(starter: Starter | None) -> None:
    """Have :func:`start_servers` of this process start them otherwise; None: as processes of this machine."""
    global _starter
    _starter = starter


def devices_are_given() -> bool:
    """Whether servers get devices from who starts them: of those that a spec names, only the number counts then."""
    return _starter is not None


def start_servers(specs: Sequence[ServerSpec]) -> list[RunningServer]:
    """Start processes, all at once, and wait until each answers.

    Raises:
        ConfigError: if one does not start, with what it said; the others are then ended.
    """
    started = (_starter or start_local)(specs)
    _started[:] = [server for server in _started if server.exited() is None] + started
    return started


def end_servers() -> None:
    """End all that :func:`start_servers` has started and nobody has closed, because an error ends the run."""
    close_all(_started)
    _started.clear()


def start_local(specs: Sequence[ServerSpec], host: str = LOOPBACK) -> list[RunningServer]:
    """Start processes on this machine, which listen on loopback, or at ``host``, only and end with this one.

    Raises:
        ConfigError: as :func:`start_servers` does.
    """
    servers: list[_LocalServer] = []
    try:
        for spec in specs:
            servers.append(_LocalServer(spec, host))
        _wait_for(servers)
    except BaseException:  # also an interrupt
        close_all(servers)
        raise
    return list(servers)


def close_all(servers: Sequence[RunningServer]) -> None:
    """End all of them side by side."""
    threads = [threading.Thread(target=server.close) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _wait_for(servers: Sequence[_LocalServer]) -> None:
    waiting, deadline = {server.answers: server for server in servers}, time.monotonic() + START_SECONDS
    while waiting:
        ready: list[Any] = wait([*waiting], timeout=max(0.0, deadline - time.monotonic()))  # type: ignore[list-item]
        for stream in ready:
            waiting.pop(stream).hear()
        if not ready:
            names = ", ".join(server.spec.what for server in waiting.values())
            raise ConfigError(f"{names} did not start within {START_SECONDS:g} seconds; see what they print")


class _LocalServer:
    """A child in a session of its own, which holds its group together until it is ended.

    It sees the end of its stdin when this process ends, however that happens.
    """

    def __init__(self, spec: ServerSpec, host: str) -> None:
        self.spec, self.url, self.token = spec, "", secrets.token_urlsafe(32)
        self._process = subprocess.Popen(
            [sys.executable, "-m", spec.module],
            env=_environment(spec),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.answers = self._process.stdout
        self._said: deque[str] = deque(maxlen=LINES_KEPT)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        # It reads its order once it has imported all it needs: a long one would keep others from starting meanwhile.
        threading.Thread(target=self._order, args=(host,), daemon=True).start()

    def _order(self, host: str) -> None:
        assert self._process.stdin is not None
        order = {"settings": self.spec.settings, "token": self.token, "host": host}
        with suppress(BrokenPipeError, ValueError):  # it ended at once, or was closed: whoever waits for it is told
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self) -> None:
        """Take its first and only line: where it listens.

        Raises:
            ConfigError: if it cannot start.
        """
        line = self.answers.readline()
        try:
            answer: dict[str, str] = dict(json.loads(line)) if line.endswith(b"\n") else {}
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.spec.what} did not start: what it imports printed {line[:200]!r} to stdout, where it says its "
                "address: have that go to stderr"
            ) from error
        if "url" not in answer:
            reason = answer.get("error") or self._how_it_ended()
            raise ConfigError(f"{self.spec.what} did not start: {reason}{self._last_words()}")
        self.url = answer["url"]

    def exited(self) -> str | None:
        """See :class:`RunningServer`."""
        return None if self._status() is None else self._how_it_ended() + self._last_words()

    def close(self) -> None:
        """See :class:`RunningServer`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.returncode is None:
            self._end()
        self._listener.join()
        self.answers.close()

    def _end(self) -> None:
        deadline = time.monotonic() + GRACE
        while self._status() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it started, too; its number is kept until here
        self._process.wait()

    def _status(self) -> int | None:
        """The exit code, negative for a signal; None while it runs. Its number stays taken."""
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def _how_it_ended(self) -> str:
        deadline = time.monotonic() + GRACE
        while (code := self._status()) is None and time.monotonic() < deadline:  # it closed its stdout before
            time.sleep(0.02)
        if code is None:
            return "its process gave no answer, and still runs"
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was killed by {signal.Signals(-code).name}"

    def _last_words(self) -> str:
        if self._status() is not None:
            self._listener.join(1.0)  # a child of its own may hold stderr open
        return "; it said last:\n" + "\n".join(f"  {line}" for line in self._said) if self._said else ""

    def _listen(self) -> None:
        """Show what it writes to stderr under its name, and keep the end of it."""
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self._said.append(line.decode(errors="replace").rstrip())
                _show(f"[{self.spec.what}] {self._said[-1]}\n")


def _show(line: str) -> None:
    # Not through sys.stderr, whose lock this thread could hold when the interpreter ends.
    with suppress(OSError):
        os.write(2, line.encode(errors="replace"))


def _environment(spec: ServerSpec) -> Mapping[str, str]:
    kept = {k: v for k, v in os.environ.items() if not is_of_ranks(k)}
    # A script's or a notebook's own folder, from which a module may come.
    path = os.pathsep.join(filter(None, sys.path))
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | _devices(spec) | spec.environment


def _devices(spec: ServerSpec) -> dict[str, str]:
    if spec.devices is None:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if seen is None else seen.split(",")
    if names is not None and any(index >= len(names) for index in spec.devices):
        raise ConfigError(
            f"{spec.what} is to have the CUDA devices {list(spec.devices)}, but this process sees {len(names)} "
            f"(CUDA_VISIBLE_DEVICES={seen}): choose among those, by their place in it"
        )
    chosen = (str(index) if names is None else names[index].strip() for index in spec.devices)
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
