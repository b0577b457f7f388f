"""Two hosts train as one: started by torchrun, srun or Lightning; hosts are network namespaces of this machine."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from lightning_hybrid.checkpoint import newest_complete
from tests.integration import small_run
from tests.integration.hosts import Host, Running, await_all, two_hosts, why_not
from tests.integration.processes import ROOT, Ended, run
from tests.integration.two_hosts import COMMAND, LAUNCHES, by_slurm, by_torchrun, recipe, small, write_data

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "two hosts can be made")]

SECONDS = 240.0  # for a run: four processes may share two cores with other tests
TIMEOUT = 20.0  # the strategy's, where a rank is lost
SOON = [f"strategy.timeout_seconds={TIMEOUT}", f"reward.timeout_seconds={TIMEOUT - 5.0}"]
PATHS = os.pathsep.join([str(ROOT), str(Path(small_run.__file__).parent)])  # where rewards are found


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """Two; what still runs on them in the end is ended."""
    with two_hosts(tmp_path) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of all runs on the real model."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "models" / "tinystories-656k"


@pytest.fixture(scope="module")
def on_one_host(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The weights that a recipe comes to on this machine alone, trained once for all tests."""

    @cache
    def train(name: str, ranks: int, steps: int = 4) -> bytes:
        folder = tmp_path_factory.mktemp(f"{name}-on-{ranks}")
        ended = run([sys.executable, *recipe(name, data, model, folder, 1, ranks, steps)], folder, SECONDS)
        assert ended.code == 0, ended
        return weights(folder)

    return train


def weights(output: Path) -> bytes:
    """Of the model that a run has written."""
    return (output / "model" / "model.safetensors").read_bytes()


def ended_well(running: list[Running]) -> list[Ended]:
    ended = await_all(running, SECONDS)
    assert [process.code for process in ended] == [0] * len(ended), "\n".join(map(str, ended))
    return ended


@pytest.mark.parametrize(
    ("launch", "name", "ranks"),
    [
        ("torchrun", "ppo", 1),
        ("static", "sft", 1),
        ("slurm", "ppo", 1),
        ("lightning", "ppo", 1),
        ("torchrun", "ppo", 2),
        ("slurm", "sft", 2),
        ("lightning", "sft", 2),
    ],
)
def test_two_hosts_train_to_the_weights_of_one(
    launch: str,
    name: str,
    ranks: int,
    hosts: list[Host],
    tmp_path: Path,
    data: Path,
    model: Path,
    on_one_host: Callable[..., bytes],
) -> None:
    job = recipe(name, data, model, tmp_path / "run", 2, ranks)
    ended_well(LAUNCHES[launch](hosts, job, ranks))
    assert weights(tmp_path / "run") == on_one_host(name, 2 * ranks)


def test_a_run_moves_from_two_hosts_to_one_and_back(
    hosts: list[Host], tmp_path: Path, data: Path, model: Path, on_one_host: Callable[..., bytes]
) -> None:
    def job(nodes: int, steps: int) -> list[object]:
        there = recipe("ppo", data, model, tmp_path / "run", nodes, 2 // nodes, steps)
        return [*there, "ckpt_path=last", "callbacks.checkpoint_every_n_steps=2"]

    ended_well(by_torchrun(hosts, job(2, 2), 1))
    alone = run([sys.executable, *job(1, 4)], tmp_path, SECONDS)
    assert alone.code == 0, alone
    ended_well(by_torchrun(hosts, job(2, 6), 1))
    assert weights(tmp_path / "run") == on_one_host("ppo", 2, 6)


@pytest.mark.parametrize("kind", ["loopback", "nothing"])
def test_hosts_whose_names_lead_nowhere_meet_by_the_interface_between_them(
    kind: str, hosts: list[Host], tmp_path: Path, data: Path, model: Path, on_one_host: Callable[..., bytes]
) -> None:
    """As Debian writes /etc/hosts, and as many containers have it: gloo alone would offer a loopback address."""
    for host, other in (hosts, reversed(hosts)):
        own = f"127.0.1.1 {host.name}\n{other.address} {other.name}\n" if kind == "loopback" else ""
        host.resolve_by("127.0.0.1 localhost\n" + own)
    job = recipe("sft", data, model, tmp_path / "run", 2, 1)
    ended_well(by_slurm(hosts, job, 1, MASTER_ADDR=hosts[0].address))
    assert weights(tmp_path / "run") == on_one_host("sft", 2)


@pytest.mark.parametrize("launch", ["torchrun", "slurm"])
def test_a_trainer_for_one_host_is_refused_on_two(
    launch: str, hosts: list[Host], tmp_path: Path, data: Path, model: Path
) -> None:
    ended = await_all(LAUNCHES[launch](hosts, recipe("sft", data, model, tmp_path / "run", 1, 1), 1), SECONDS)
    expected = r"starts 2 processes, 1 on each host, but the Trainer expects 1: .* set trainer.devices=1 trainer.num_no"
    for process in ended:
        assert process.code > 0, process
        assert re.search(expected, process.err), process


def test_a_first_host_that_is_not_there_is_named_by_the_run_and_by_the_doctor(
    hosts: list[Host], tmp_path: Path, data: Path, model: Path
) -> None:
    astray = {"MASTER_ADDR": "10.77.0.9", "MASTER_PORT": "29500", "NODE_RANK": "1"}
    job = [*recipe("sft", data, model, tmp_path / "run", 2, 1), f"strategy.timeout_seconds={TIMEOUT}"]
    (alone,) = await_all([hosts[1].start("run", sys.executable, *job, **astray)], SECONDS)
    assert alone.code > 0, alone
    assert "ranks could not meet at 10.77.0.9:29500: " in alone.err, alone
    (doctor,) = await_all([hosts[1].start("doctor", sys.executable, COMMAND, "doctor", **astray)], SECONDS)
    assert doctor.code == 1, doctor
    assert "MASTER_ADDR=10.77.0.9 (10.77.0.9) cannot be reached: " in doctor.out, doctor


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the built-in task's data, and one for the files by which ranks say that they score."""
    small_run.prepare(tmp_path)
    (tmp_path / "pauses").mkdir()
    return tmp_path


def pausing(place: Path) -> dict[str, str]:
    return {"PYTHONPATH": PATHS, "PAUSE_FOLDER": str(place / "pauses"), "PAUSE_SECONDS": "2"}


def await_scoring(place: Path, call: int, running: list[Running]) -> list[int]:
    """Process ids of the two ranks, once both score for the `call`-th time."""
    deadline = time.monotonic() + SECONDS
    while len(found := list((place / "pauses").glob(f"*-{call}"))) < 2:
        assert time.monotonic() < deadline, "\n".join(map(str, await_all(running, 0)))
        assert all(one.process.poll() is None for one in running), "\n".join(map(str, await_all(running, 0)))
        time.sleep(0.02)
    return [int(path.name.split("-")[0]) for path in found]


def test_a_killed_rank_is_named_on_the_other_host_and_torchrun_goes_on_from_the_newest_checkpoint(
    hosts: list[Host], place: Path
) -> None:
    job = small(place / "run", "strategy.timeout_seconds=600", "ckpt_path=last")  # restarted ranks may be late
    running = by_torchrun(hosts, job, 1, "--max-restarts=1", **pausing(place))
    (there,) = filter(hosts[1].has, await_scoring(place, 3, running))
    os.kill(there, signal.SIGKILL)
    first, _ = ended_well(running)
    assert re.search(r"RankLostError: rank \d \(.*\) lost another rank: rank \d .* on node2: killed", first.err), first
    whole = run(
        [sys.executable, *small(place / "whole", "trainer.num_nodes=1", "trainer.devices=2")],
        place,
        SECONDS,
        PYTHONPATH=PATHS,
    )
    assert whole.code == 0, whole
    assert weights(place / "run") == weights(place / "whole")


@pytest.mark.parametrize("launch", ["slurm", "static"])
def test_when_the_cable_is_cut_both_hosts_stop_in_time_and_say_whom_they_miss(
    launch: str, hosts: list[Host], place: Path
) -> None:
    job = small(place / "run", *SOON)
    running = LAUNCHES[launch](hosts, job, 1, **pausing(place))
    await_scoring(place, 3, running)
    began = time.monotonic()
    hosts[1].lose_cable()
    ended = await_all(running, 4 * TIMEOUT)
    seconds = time.monotonic() - began
    first, second = ended
    assert min(first.code, second.code) > 0, f"{first}\n{second}"
    assert seconds < TIMEOUT + 30.0
    lost = r"RankLostError: rank {} \(reward, step 3\) lost another rank: rank {} .* on {}: killed, stopped or cut off"
    assert re.search(lost.format(0, 1, "node2"), first.err), first
    assert re.search(lost.format(1, 0, "node1"), second.err), second


def test_hosts_that_do_not_share_the_checkpoints_are_refused(hosts: list[Host], place: Path) -> None:
    ended_well(by_slurm(hosts, small(place / "run", "trainer.max_steps=2"), 1, PYTHONPATH=PATHS))
    newest = newest_complete(place / "run" / "checkpoints")
    assert newest is not None
    hosts[1].hide(place / "run" / "checkpoints")
    again = by_slurm(hosts, small(place / "run", "ckpt_path=last"), 1, PYTHONPATH=PATHS)
    for process in await_all(again, SECONDS):
        assert process.code == 1, process
        listed = rf"\[rank\d\]:   rank 0: '{re.escape(str(newest))}'\n\[rank\d\]:   rank 1: none\n"
        assert re.search(listed, process.err), process
        assert "keep checkpoints in a folder that all machines share" in process.err


def test_checkpoints_are_not_written_half_on_one_disk_and_half_on_another(hosts: list[Host], place: Path) -> None:
    (place / "run" / "checkpoints").mkdir(parents=True)
    hosts[1].hide(place / "run" / "checkpoints")
    for process in await_all(by_slurm(hosts, small(place / "run"), 1, PYTHONPATH=PATHS), SECONDS):
        assert process.code == 1, process
        assert "rank 0 does not see what other ranks wrote under" in process.err
        assert "use a folder that all machines share" in process.err
    assert newest_complete(place / "run" / "checkpoints") is None
