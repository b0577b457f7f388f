"""Runs that are stopped by signals or killed, as real processes, and go on as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_hybrid.checkpoint import newest_complete
from tests.integration import processes, small_run
from tests.integration.processes import Ended, free_port

SCRIPT = Path(small_run.__file__)
SECONDS = 90
CLOCKS = ("seconds/", "throughput/", "engine/", "memory/")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the task's data; the run's own is `run` in it."""
    small_run.prepare(tmp_path)
    (tmp_path / "pauses").mkdir()
    return tmp_path


class Running:
    """A small run that has been started."""

    def __init__(self, place: Path, recipe: str, *changes: str, output: str = "run", **environment: str) -> None:
        launch = environment.pop("launch", "").split()
        self.place, self.files = place, place / f"{output}-{time.monotonic_ns()}"
        command = [sys.executable, *launch, SCRIPT, recipe, place / output, *changes]
        paths = os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
        self.process = processes._start(command, {"PYTHONPATH": f"{processes.ROOT}:{paths}", **environment}, self.files)

    def ranks_in_reward(self, count: int = 1, call: int = 0) -> list[int]:
        """Process ids of the ranks, when so many of them have begun to score for the `call`-th time."""
        deadline = time.monotonic() + SECONDS
        while len(found := sorted((self.place / "pauses").glob(f"*-{call}"))) < count:
            assert time.monotonic() < deadline, self.end()
            assert self.process.poll() is None, self.end()
            time.sleep(0.02)
        return [int(path.name.split("-")[0]) for path in found]

    def end(self) -> Ended:
        with suppress(subprocess.TimeoutExpired):  # it is then ended, and its exit code tells
            self.process.wait(SECONDS)
        processes._end(self.process)
        return processes._read(self.process, self.files)


def pausing(place: Path, seconds: float = 1.5) -> dict[str, str]:
    return {"PAUSE_FOLDER": str(place / "pauses"), "PAUSE_SECONDS": str(seconds)}


def checkpoint(place: Path) -> Path:
    newest = newest_complete(place / "run" / "checkpoints")
    assert newest is not None
    return newest


def whole(place: Path, recipe: str, *changes: str, output: str = "run") -> Ended:
    """Run to the end."""
    ended = Running(place, recipe, *changes, output=output).end()
    assert ended.code == 0, ended
    assert "came to its end" in ended.out
    return ended


def samples(place: Path, output: str = "run") -> list[str]:
    return (place / output / "samples.jsonl").read_text().splitlines()


def metrics(place: Path, output: str = "run") -> list[dict[str, str]]:
    """The rows of the log, without what a clock measures."""
    with (place / output / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


@pytest.mark.slow
def test_sigterm_lets_the_phase_end_and_leaves_a_checkpoint(place: Path) -> None:
    run = Running(place, "ppo", **pausing(place))
    (rank,) = run.ranks_in_reward(call=1)
    os.kill(rank, signal.SIGTERM)
    ended = run.end()
    assert ended.code == 0, ended
    expected = "SIGTERM: finishing the phase 'reward', then writing a checkpoint; once more to stop at once"
    assert expected in ended.err
    assert f"checkpoint: {checkpoint(place)}" in ended.err
    assert checkpoint(place).name == "step=000001.ckpt"
    assert "with ckpt_path=last" in ended.err
    assert "came to its end" not in ended.out
    assert not (place / "run" / "model").exists()
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_run_that_goes_on_samples_what_it_would_have_sampled(place: Path) -> None:
    for call in (1, 0):
        run = Running(place, "ppo", "ckpt_path=last", **pausing(place))
        (rank,) = run.ranks_in_reward(call=call)
        os.kill(rank, signal.SIGTERM)
        assert run.end().code == 0
        for left in (place / "pauses").iterdir():
            left.unlink()
    whole(place, "ppo", "ckpt_path=last")
    whole(place, "ppo", output="other")
    assert samples(place) == samples(place, "other")
    assert metrics(place) == metrics(place, "other")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "step"), [("ppo", 5), ("sft", 5), ("sft", 6), ("sft", 8)])
def test_a_run_that_was_killed_and_goes_on_logs_what_it_would_have_logged(recipe: str, step: int, place: Path) -> None:
    killed = Running(place, recipe, KILL_IN_STEP=str(step)).end()
    assert killed.code == -signal.SIGKILL, killed
    if (place / "run" / "samples.jsonl").exists():
        with (place / "run" / "samples.jsonl").open("a") as file:
            file.write('{"step": 5, "prom')  # killed while writing
    whole(place, recipe, "ckpt_path=last")
    whole(place, recipe, output="other")
    assert metrics(place) == metrics(place, "other")
    if recipe == "ppo":
        assert samples(place) == samples(place, "other")


@pytest.mark.slow
def test_ctrl_c_does_the_same_and_ends_as_interrupted(place: Path) -> None:
    run = Running(place, "ppo", **pausing(place))
    (rank,) = run.ranks_in_reward()
    os.kill(rank, signal.SIGINT)
    ended = run.end()
    assert ended.code == 130, ended
    assert f"checkpoint: {checkpoint(place)}" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_stops_at_once(number: signal.Signals, code: int, place: Path) -> None:
    run = Running(place, "ppo", **pausing(place, seconds=60.0))
    (rank,) = run.ranks_in_reward()
    os.kill(rank, number)
    time.sleep(1.2)
    begin = time.monotonic()
    os.kill(rank, number)
    ended = run.end()
    assert time.monotonic() - begin < 20
    assert ended.code == code, ended
    assert "stopping at once" in ended.err
    assert newest_complete(place / "run" / "checkpoints") is None


@pytest.fixture
def scontrol(tmp_path: Path) -> Path:
    """A stand-in for SLURM's command, which writes down what it is told."""
    program, told = tmp_path / "bin" / "scontrol", tmp_path / "told"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    program.chmod(0o755)
    return told


def slurm(place: Path) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{place}/bin:{os.environ['PATH']}",
    }


@pytest.mark.slow
def test_slurm_is_asked_to_run_the_job_again_which_then_goes_on(place: Path, scontrol: Path) -> None:
    run = Running(place, "ppo", **pausing(place), **slurm(place))
    (rank,) = run.ranks_in_reward(call=2)
    os.kill(rank, signal.SIGUSR1)
    ended = run.end()
    assert ended.code == 0, ended
    assert scontrol.read_text() == "requeue 4711\n"
    assert checkpoint(place).name == "step=000002.ckpt"
    again = Running(place, "ppo", SLURM_RESTART_COUNT="1", **slurm(place)).end()
    assert again.code == 0, again
    assert [json.loads(line)["step"] for line in samples(place)] == [n for n in range(1, 7) for _ in range(4)]


@pytest.mark.slow
def test_sigterm_from_slurm_stops_without_a_new_start(place: Path, scontrol: Path) -> None:
    run = Running(place, "ppo", **pausing(place), **slurm(place))
    (rank,) = run.ranks_in_reward()
    os.kill(rank, signal.SIGTERM)
    assert run.end().code == 0
    assert not scontrol.exists()


def torchrun() -> str:
    return f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()}"


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["", "torchrun"], ids=["lightning", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_both(number: signal.Signals, launch: str, place: Path) -> None:
    run = Running(place, "ppo", "trainer.devices=2", launch=torchrun() if launch else "", **pausing(place))
    ranks = run.ranks_in_reward(count=2)
    (other,) = set(ranks) - {run.process.pid} if not launch else ranks[1:]
    os.kill(other, number)
    ended = run.end()
    if launch and number == signal.SIGINT:
        assert ended.code == 1, ended  # torchrun's, of ranks that ended with another code than 0
    else:
        assert ended.code == (0 if number == signal.SIGTERM else 130), ended
    assert ended.err.count("checkpoint: ") == 1
    assert checkpoint(place)


@pytest.mark.slow
def test_a_reward_that_fails_for_good_leaves_a_checkpoint_on_two_ranks(place: Path) -> None:
    ended = Running(place, "ppo", "trainer.devices=2", FAIL_REWARD="1").end()
    assert ended.code not in (0, 130), ended
    assert "the judge is away" in ended.err
    assert f"checkpoint: {checkpoint(place)}" in ended.err
