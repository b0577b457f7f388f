"""Recipes in workers of a real local Ray cluster."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from tests.integration.small_run import overrides, prepare

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
PATIENCE = 900.0  # seconds for one command, of which each rank needs a dozen to import what it trains with
TWO = "trainer.devices=2"
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # where a cluster listens, and a command looks for it


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    seconds: float


class Command:
    """A program of a test in a session of its own, with all that Ray starts for it."""

    def __init__(self, arguments: Sequence[object], folder: Path, **environment: str) -> None:
        paths = [ROOT, HERE, ROOT / "tests" / "integration", folder]
        variables = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"} | environment
        self._began = time.monotonic()
        self._log = folder / f"command-{time.time_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env={**os.environ, **variables},
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self) -> Ended:
        """Wait for it."""
        try:
            code = self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        ended = Ended(code, self._log.read_text(), time.monotonic() - self._began)
        print(f"--- {ended.seconds:.0f} s, exit code {ended.code}\n{ended.out[-6000:]}")
        return ended


def recipe(name: str, folder: Path, output: str, *changes: str, **environment: str) -> Command:
    command = [ROOT / "lightning_hybrid_cli.py", name, *overrides(name, folder / output), TWO, *changes]
    return Command(command, folder, **environment)


def job(name: str, folder: Path, *changes: str, **environment: str) -> tuple[Ended, list[list[dict[str, Any]]]]:
    """One of jobs.py, and what each rank wrote."""
    output = folder / name
    ended = Command([HERE / "jobs.py", name, output, *changes], folder, **ON_LOOPBACK, **environment).end()
    return ended, [json.loads(file.read_text()) for file in sorted(output.glob("rank*.json"))]


def rows(folder: Path) -> list[dict[str, str]]:
    """Of metrics.csv, without what depends on the speed of the machine."""
    with (folder / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    timed = ("seconds/", "throughput/", "engine/", "memory/")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in found]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def assert_no_traces(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if path.name.startswith(".ray")] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    prepare(folder)
    return folder


def test_sft_ends_with_the_weights_and_metrics_of_a_run_without_ray(place: Path) -> None:
    alone = recipe("sft", place, "alone").end()
    in_ray = recipe("sft", place, "in_ray", "launcher=ray").end()
    assert (alone.code, in_ray.code) == (0, 0)
    assert weights(place / "in_ray") == weights(place / "alone")
    assert rows(place / "in_ray") == rows(place / "alone")
    assert "RayTrainWorker" not in in_ray.out
    assert "PlacementGroupCleaner" not in in_ray.out
    assert_no_traces(place / "in_ray")


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    """The folder of a run of PPO without Ray."""
    assert recipe("ppo", place, "undisturbed").end().code == 0
    return place / "undisturbed"


def test_after_a_worker_is_killed_the_run_goes_on_from_its_newest_checkpoint(place: Path, undisturbed: Path) -> None:
    calls = place / "calls"
    calls.mkdir()
    command = recipe("ppo", place, "disturbed", "launcher=ray", PAUSE_FOLDER=str(calls), PAUSE_SECONDS="1.0")
    killed = one_that_scores(calls, 3, command)
    os.kill(killed, signal.SIGKILL)
    ended = command.end()
    assert ended.code == 0
    assert "starting the workers again (loss 1 of at most 3)" in ended.out
    ranks = {path.name.split("-")[0] for path in calls.iterdir()}
    assert len(ranks) == 4, "two ranks, and two again"
    # The checkpoint of two iterations is gone on from: four of six are left.
    assert {len(list(calls.glob(f"{rank}-*"))) for rank in ranks if int(rank) != killed} >= {4}
    assert [row["step"] for row in rows(place / "disturbed")] == [row["step"] for row in rows(undisturbed)]
    assert rows(place / "disturbed") == rows(undisturbed)
    assert weights(place / "disturbed") == weights(undisturbed)
    assert_no_traces(place / "disturbed")


def test_ctrl_c_has_the_ranks_write_a_checkpoint_from_which_the_run_goes_on(place: Path, undisturbed: Path) -> None:
    calls = place / "calls of a run that stops"
    calls.mkdir()
    rarely = "callbacks.checkpoint_every_n_steps=100"
    command = recipe("ppo", place, "stopped", "launcher=ray", rarely, PAUSE_FOLDER=str(calls), PAUSE_SECONDS="3.0")
    one_that_scores(calls, 2, command)
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal sends it, to all that Ray has started there
    stopped = command.end()
    assert stopped.code == 130
    assert "SIGINT: the ranks finish what they do; once more to stop at once" in stopped.out
    assert "checkpoint: " in stopped.out
    assert len({path.name.split("-")[0] for path in calls.iterdir()}) == 2, "nobody was started again"
    assert_no_traces(place / "stopped")
    last = recipe("ppo", place, "stopped", "launcher=ray", rarely, "ckpt_path=last").end()
    assert last.code == 0
    assert weights(place / "stopped") == weights(undisturbed)


def one_that_scores(calls: Path, call: int, command: Command) -> int:
    """The pid of a rank at its reward of iteration ``call`` + 1, where it writes it down."""
    deadline = time.monotonic() + PATIENCE
    while not (begun := sorted(calls.glob(f"*-{call}"))):
        assert time.monotonic() < deadline, "no rank came so far"
        assert command.process.poll() is None, command.end().out
        time.sleep(0.1)
    return int(begun[-1].name.split("-")[0])


# ---- jobs in a cluster of two nodes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with two cores each, on this machine."""
    code = (
        "from ray.cluster_utils import Cluster\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 2, 'include_dashboard': False})\n"
        "cluster.add_node(num_cpus=2)\n"
        "print(cluster.address, flush=True)\n"
        "input()\n"
        "cluster.shutdown()\n"
    )
    environment = {**os.environ, **ON_LOOPBACK, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines = (line.strip() for line in process.stdout)
    yield next(line for line in lines if line.startswith("127.0.0.1:"))
    process.communicate("\n", timeout=120)


def test_ranks_are_spread_over_nodes_and_find_what_the_command_has(two_nodes: str, tmp_path: Path) -> None:
    (tmp_path / "beside_the_command.py").write_text("WORD = 'found'\n")
    words = {"PLAIN_WORD": "plain", "SECRET_WORD": "hidden"}
    ended, written = job("tell", tmp_path, "launcher.placement=SPREAD", f"launcher.address='{two_nodes}'", **words)
    assert ended.code == 0
    (first,), (second,) = written
    assert first["node"] != second["node"]
    for rank, told in enumerate((first, second)):
        assert told["folder"] == str(tmp_path)
        assert told["word"] == "found"
        assert told["variables"] == {"PLAIN_WORD": "plain", "SECRET_WORD": "hidden", "DS_ACCELERATOR": "cpu"}
        assert told["ranks"] == [0, 1]
        assert told["trainer"][:2] == [2, rank]
        assert told["sampler"] == {"num_replicas": 2, "rank": rank}
        assert told["shown"]["PLAIN_WORD"] == "plain"
        assert "SECRET_WORD" not in told["shown"]


def test_servers_of_roles_are_actors_that_end_with_their_close(two_nodes: str, tmp_path: Path) -> None:
    ended, written = job("serve", tmp_path, f"launcher.address='{two_nodes}'")
    assert ended.code == 0
    answered, broken = written[0]
    assert [answer["text"] for answer in answered["answers"]] == ["word 0: hello", "word 1: hello"]
    assert answered["running"] == [None, None]
    assert all(url.startswith("http://127.0.0.1:") for url in answered["urls"])
    assert "echo 0" in answered["after"]
    assert "no such model" in broken["broken"]
    for answer in answered["answers"]:
        assert not Path(f"/proc/{answer['pid']}").exists()


def test_an_error_of_ours_ends_the_run_at_once_with_its_message(two_nodes: str, tmp_path: Path) -> None:
    ended, written = job("fail", tmp_path, f"launcher.address='{two_nodes}'")
    assert ended.code == 2
    assert "DataError: row 7 of rows.jsonl has no text" in ended.out
    assert "Traceback" not in ended.out
    assert [len(calls) for calls in written] == [1, 1], "no rank was started again"


def test_workers_that_are_lost_again_and_again_end_the_run(two_nodes: str, tmp_path: Path) -> None:
    ended, written = job("break_down", tmp_path, f"launcher.address='{two_nodes}'", "launcher.max_failures=1")
    assert ended.code == 2
    assert "RankLostError: workers were lost 2 times, more often than launcher.max_failures=1" in ended.out
    assert [len(calls) for calls in written] == [2, 2]


# ---- what is refused before anything starts --------------------------------------------------------------------------


def test_a_cluster_that_is_too_small_is_refused_with_the_numbers(place: Path) -> None:
    ended = recipe("sft", place, "too_small", "launcher=ray", "launcher.cpus_per_rank=400.0").end()
    assert ended.code == 2
    assert f"error: the Ray cluster is too small: 800 CPU are needed and it has {os.cpu_count()}" in ended.out
    assert "2 ranks with 400 CPU and 0 GPU each" in ended.out
    assert not (place / "too_small" / "metrics.csv").exists()


def test_a_cluster_that_is_not_there_is_said(place: Path) -> None:
    ended = recipe("sft", place, "nowhere", "launcher=ray", "launcher.address='127.0.0.1:1'").end()
    assert ended.code == 2
    assert "error: launcher.address: cannot reach the cluster at '127.0.0.1:1'" in ended.out
