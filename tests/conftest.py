"""Fixtures for all tests: a repeatable environment, real processes as ranks, the inputs beside the checkout."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "CROSS_RANK",
    "CROSS_SIZE",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "TORCHELASTIC_RUN_ID",
)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks of a test share the machine
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))  # never another version's
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

_CALL = """
import json, runpy, sys
path, name, arguments = sys.argv[1:]
runpy.run_path(path, run_name="ranks")[name](*json.loads(arguments))
import torch
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # its threads would end the process while others still talk to it
"""


@pytest.fixture(autouse=True, scope="module")
def descriptors_are_given_back() -> Iterator[None]:
    """What a Trainer holds goes with a round of the garbage collector, which may be far away."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def isolated_launch() -> Iterator[None]:
    """No test sees the launch variables, the rank, the process group or the deterministic mode of another one."""
    before = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    os.environ.clear()
    os.environ.update(before)
    yield
    os.environ.clear()
    os.environ.update(before)
    rank_zero_only.rank = 0  # a Trainer tells it
    torch.use_deterministic_algorithms(False)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the checkout; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"no real models and data at {folder}")
    return folder


@pytest.fixture
def alone_in_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of this process alone, ready for DeepSpeed engines."""
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (launch | {"MASTER_PORT": str(_free_port())}).items():
        monkeypatch.setenv(name, value)
    from lightning_hybrid.engines.environment import forget_process_groups, prepare_deepspeed

    prepare_deepspeed("cpu")
    import deepspeed

    forget_process_groups()
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo", verbose=False)


RunRanks = Callable[..., list[str]]


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """Run code on several real ranks: `run_ranks(target, world_size, *arguments, timeout=120, env=None)`.

    `target` is a function at the top level of a file, called with `arguments` (anything JSON can carry) in each
    rank, or the path of a script, called with them as its command line. Returns what each rank wrote to stdout.
    The test fails, with all that the ranks wrote, when one fails or time runs out.
    """

    def run(
        target: Callable[..., Any] | str | Path,
        world_size: int,
        *arguments: Any,
        timeout: float = 120,
        env: dict[str, str] | None = None,
    ) -> list[str]:
        command = _command(target, arguments)
        port = str(_free_port())
        ranks = []
        for rank in range(world_size):
            environment = _rank_environment(rank, world_size, port) | (env or {})
            ranks.append(_start(command, environment, tmp_path / f"rank{rank}"))
        _wait(ranks, timeout)
        report = "\n".join(_report(rank, process, tmp_path / f"rank{rank}") for rank, process in enumerate(ranks))
        if any(process.returncode for process in ranks):
            pytest.fail(f"ranks failed, or took more than {timeout} s:\n{report}", pytrace=False)
        return [(tmp_path / f"rank{rank}.out").read_text() for rank in range(world_size)]

    return run


def _command(target: Callable[..., Any] | str | Path, arguments: tuple[Any, ...]) -> list[str]:
    if callable(target):
        file, name = target.__code__.co_filename, target.__name__
        return [sys.executable, "-c", _CALL, file, name, json.dumps(arguments)]
    return [sys.executable, str(target), *map(str, arguments)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    launch = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",  # by which Lightning knows torchrun
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return os.environ | launch


def _start(command: list[str], environment: dict[str, str], files: Path) -> subprocess.Popen[bytes]:
    """A rank that writes to files, so that no full pipe blocks it, in a session of its own, to be ended whole."""
    with files.with_suffix(".out").open("wb") as out, files.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err, cwd=ROOT, start_new_session=True)


def _wait(ranks: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Until all have ended, one has failed, or time is out; the rest is then ended."""
    deadline = time.monotonic() + timeout
    while None in (codes := [rank.poll() for rank in ranks]):
        if any(codes) or time.monotonic() > deadline:
            time.sleep(1.0)  # let the others say what they saw
            break
        time.sleep(0.05)
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def _report(rank: int, process: subprocess.Popen[bytes], files: Path) -> str:
    out, err = files.with_suffix(".out").read_text(), files.with_suffix(".err").read_text()
    return f"--- rank {rank}: exit code {process.returncode}\n{out[-4000:]}\n{err[-8000:]}"
