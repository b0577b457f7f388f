"""Two hosts on one machine: each with a network, a name and mounts of its own, and a cable between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.integration import processes
from tests.integration.processes import Ended

NAMES = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HOSTS_FILE = "127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n"
SEPARATE = ("--net", "--uts", "--mount")  # what a host does not share with the machine


def why_not() -> str:
    """What this machine lacks for hosts; "" if nothing."""
    missing = [program for program in ("ip", "unshare", "nsenter", "mount") if shutil.which(program) is None]
    if missing:
        return f"two hosts need {', '.join(missing)}"
    if subprocess.run(["unshare", *SEPARATE, "true"], capture_output=True).returncode != 0:
        return "two hosts need the right to make network namespaces (root)"
    return ""


@dataclass
class Host:
    """One of them.

    Attributes:
        name: its host name.
        address: at its end of the cable.
        holder: a process that does nothing there; the host is gone when it and all others there have ended.
        folder: for what its processes write.
    """

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    folder: Path

    def inside(self, *command: object) -> list[str]:
        """A command line that runs another one there; the process is the same."""
        flags = [f"--target={self.holder.pid}", *SEPARATE, f"--wdns={self.folder}"]
        return ["nsenter", *flags, "--", *map(str, command)]

    def do(self, *command: object, given: str = "") -> str:
        """Run a small command there to its end; what it wrote."""
        ended = subprocess.run(self.inside(*command), input=given, capture_output=True, text=True, timeout=30)
        assert ended.returncode == 0, f"{command} on {self.name}: {ended.stderr}"
        return ended.stdout

    def start(self, name: str, *command: object, **environment: str) -> Running:
        """Start a command there, in a session of its own; its output is in files of that name."""
        environment = {"PYTHONFAULTHANDLER": "1", **environment}
        return Running(processes._start(self.inside(*command), environment, self.folder / name), self.folder / name)

    def resolve_by(self, text: str) -> None:
        """Names are what this says, in the form of /etc/hosts."""
        (self.folder / "hosts").write_text(text)

    def has(self, pid: int) -> bool:
        """Whether a process runs here."""
        here, there = (os.readlink(f"/proc/{one}/ns/net") for one in (self.holder.pid, pid))
        return here == there

    def hide(self, folder: Path) -> None:
        """Have an empty folder of this host alone in place of one that is shared."""
        own = self.folder / "hidden"
        own.mkdir()
        self.do("mount", "--bind", own, folder)

    def lose_cable(self) -> None:
        """From now on nothing gets through; nobody is told."""
        self.do("ip", "link", "set", "cable", "down")


@dataclass
class Running:
    """A process that was started on a host."""

    process: subprocess.Popen[bytes]
    files: Path

    def written(self) -> str:
        """What it has written until now, to stdout and then to stderr."""
        return "".join(self.files.with_suffix(end).read_text(errors="replace") for end in (".out", ".err"))

    def await_words(self, words: str, limit: float) -> None:
        """Until it has written them."""
        deadline = time.monotonic() + limit
        while words not in self.written():
            assert time.monotonic() < deadline, f"no {words!r} after {limit} s:\n{self.written()[-6000:]}"
            assert self.process.poll() is None, f"ended without {words!r}:\n{self.written()[-6000:]}"
            time.sleep(0.05)

    def end(self) -> Ended:
        """End it and all that it started, where it has not ended by itself, and say how it ended."""
        processes._end(self.process)
        return processes._read(self.process, self.files)


def await_all(running: Sequence[Running], limit: float) -> list[Ended]:
    """Until all have ended by themselves, or time is out; the rest is then ended, with a negative code."""
    deadline = time.monotonic() + limit
    while any(one.process.poll() is None for one in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [one.end() for one in running]


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Node1 and node2, with a cable between 10.77.0.1 and 10.77.0.2; they share the machine's disk.

    What still runs there when the block is left is ended.
    """
    with ExitStack() as stack:
        hosts = [stack.enter_context(_host(*named, folder)) for named in zip(NAMES, ADDRESSES, strict=True)]
        first, second = (str(host.holder.pid) for host in hosts)
        cable = ["ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]
        subprocess.run(cable, check=True, capture_output=True, timeout=30)
        for host in hosts:
            host.do("ip", "address", "add", f"{host.address}/24", "dev", "cable")
            host.do("ip", "link", "set", "lo", "up")
            host.do("ip", "link", "set", "cable", "up")
        yield hosts


@contextmanager
def _host(name: str, address: str, folder: Path) -> Iterator[Host]:
    own = folder / name
    own.mkdir()
    # It ends when its stdin is closed, also where this process is killed.
    holder = subprocess.Popen(["unshare", *SEPARATE, "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    host = Host(name, address, holder, own)
    try:
        _await_separation(holder.pid)
        host.do("hostname", name)
        host.resolve_by(HOSTS_FILE)
        host.do("mount", "--bind", own / "hosts", "/etc/hosts")
        yield host
    finally:
        _end_all(host)
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait(10)


def _end_all(host: Host) -> None:
    """Also ranks whose launcher was ended before them; but not the holder, by which the others are known."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if host.has(int(process.name)) and int(process.name) != host.holder.pid:
                os.kill(int(process.name), signal.SIGKILL)


def _await_separation(pid: int) -> None:
    """Until the process has left the machine's network; its mounts are the last that it leaves."""
    deadline = time.monotonic() + 10.0
    while os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
        assert time.monotonic() < deadline, "no namespaces after 10 s"
        time.sleep(0.01)
