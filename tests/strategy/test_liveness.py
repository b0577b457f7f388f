"""Whatever becomes of one rank, the others end within the stated time, and say which rank it was and why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, distributed_c10d

from lightning_hybrid import HybridDeepSpeedStrategy
from lightning_hybrid.errors import RankLostError, RewardError
from lightning_hybrid.strategy.beats import INTERVAL, Beat, Heard
from lightning_hybrid.strategy.launcher import how_it_ended
from lightning_hybrid.strategy.liveness import EXIT_CODE, GRACE, Liveness, is_failed_collective, write_to_stderr
from lightning_hybrid.strategy.lost_ranks import limit_collectives
from tests.helpers import Regression, quiet_trainer, random_batches
from tests.integration.processes import free_port

SCRIPT = Path(__file__).with_name("lost_ranks.py")
ROOT = SCRIPT.parents[2]
TIMEOUT = 8.0  # seconds, as the ranks are told
START = 150.0  # seconds until the harm is done, on a machine with much else to do


@dataclass(frozen=True)
class Survivor:
    """A rank that came to no harm: exit code, what it wrote to stderr, seconds from the harm to its end."""

    code: int
    err: str
    seconds: float


class Ranks:
    """Two ranks, and what becomes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def harm(self, how: str, harmed: int) -> Survivor:
        """Run both, harm one of them, and wait for the other."""
        self.start(how, harmed)
        return _survivor(self.processes[1 - harmed], self.folder, self.folder / f"{1 - harmed}.err")

    def start(self, how: str, harmed: int, *more: str) -> None:
        port = str(free_port())
        arguments = [how, str(harmed), str(self.folder), str(TIMEOUT), *more]
        self.processes += [_start(rank, port, arguments, self.folder) for rank in range(2)]

    def end(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    yield started
    started.end()


def _start(rank: int, port: str, arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    launch = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    with (folder / f"{rank}.err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | launch,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
        )


def _survivor(process: subprocess.Popen[bytes], folder: Path, err: Path) -> Survivor:
    harm = folder / "harm"
    deadline = time.monotonic() + START
    while not harm.exists() and process.poll() is None:
        assert time.monotonic() < deadline, f"no harm was done:\n{err.read_text()}"
        time.sleep(0.05)
    try:
        process.wait(timeout=TIMEOUT + 60)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it hangs:\n{err.read_text()[-4000:]}", pytrace=False)
    return Survivor(process.returncode, err.read_text(), time.time() - float(harm.read_text()))


@pytest.mark.slow
def test_a_killed_rank_is_named_by_the_other(ranks: Ranks) -> None:
    survivor = ranks.harm("kill", 1)
    assert (
        "RankLostError: rank 0 (optimizer_step, step 3) lost another rank: rank 1 has not been heard of" in survivor.err
    )
    assert "s; it was last in reward, step 3: killed, stopped or cut off" in survivor.err
    assert "RuntimeError" in survivor.err  # the collective's own error is the cause
    assert survivor.code == 1
    assert survivor.seconds < TIMEOUT + 15


@pytest.mark.slow
def test_the_rank_that_holds_the_store_is_named_too(ranks: Ranks) -> None:
    survivor = ranks.harm("kill", 0)
    assert (
        "lost another rank: rank 0 is gone: the store, which it or its launcher holds, cannot be reached"
        in survivor.err
    )
    assert "it was last in reward, step 3: killed, stopped or cut off" in survivor.err
    assert survivor.code == 1
    assert survivor.seconds < TIMEOUT + 15


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_once_the_stated_time_is_over(ranks: Ranks, rank: int) -> None:
    survivor = ranks.harm("stop", rank)
    said = {
        0: "rank 0 is gone: the store, which it or its launcher holds, has not answered for",
        1: "rank 1 has not been",
    }
    assert f"RankLostError: rank {1 - rank} (optimizer_step, step 3) lost another rank: {said[rank]}" in survivor.err
    assert TIMEOUT - 1 < survivor.seconds < TIMEOUT + 15


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_of_a_rank_is_told_by_the_other(ranks: Ranks, rank: int) -> None:
    survivor = ranks.harm("raise", rank)
    assert f"lost another rank: rank {rank} stopped: ValueError: the reward is out of order" in survivor.err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_lives_but_hangs_is_named_with_what_it_does(ranks: Ranks, rank: int) -> None:
    survivor = ranks.harm("sleep", rank)
    assert f"lost another rank: rank {rank} is alive but has been in reward, step 3 for" in survivor.err
    assert TIMEOUT - 1 < survivor.seconds < TIMEOUT + 15
    # Nobody can wake it, and it ends: what it heard last was the other's end.
    assert ranks.processes[rank].wait(timeout=TIMEOUT + 15) == EXIT_CODE
    said = f"rank {rank} (reward, step 3) waited for 8 s: rank {1 - rank} stopped: RankLostError"
    assert said in (ranks.folder / f"{rank}.err").read_text()


@pytest.mark.slow
def test_runs_one_after_another_leave_nothing_behind(ranks: Ranks) -> None:
    ranks.start("unharmed", 0, "2")
    assert [process.wait(timeout=START) for process in ranks.processes] == [0, 0]
    assert not any("lightning-hybrid:" in (ranks.folder / f"{rank}.err").read_text() for rank in range(2))


@pytest.mark.slow
def test_ranks_that_lightning_starts_end_with_the_one_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "kill", "1", str(tmp_path), "60"]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, stderr=err, start_new_session=True
        )
    survivor = _survivor(process, tmp_path, tmp_path / "err")
    assert "lost another rank: rank 1 was killed by SIGKILL" in survivor.err
    assert survivor.code == 1


# ---- two ranks in one process, which is quick ---------------------------------------------------------------------


@pytest.fixture
def pair(alone_in_group: None) -> Iterator[tuple[Liveness, Liveness]]:
    made = [Liveness(rank, 2, 600.0, lambda: 12) for rank in range(2)]
    for liveness in made:
        liveness.start()
    yield made[0], made[1]
    for liveness in made:
        liveness._words = None
        liveness.stop()
    assert not [thread for thread in threading.enumerate() if "ranks" in thread.name]


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234")


def test_what_stopped_a_rank_is_heard_by_the_other(pair: tuple[Liveness, Liveness]) -> None:
    first, second = pair
    with pytest.raises(RewardError, match="out of order"), second.doing("training_step"):
        raise RewardError("the reward is out of order")
    with pytest.raises(RankLostError) as caught, first.doing("training_step"), first.doing(None):
        raise CLOSED
    said = "rank 0 (training_step, step 12) lost another rank: rank 1 stopped: RewardError: the reward is out of order"
    assert str(caught.value) == said
    assert caught.value.__cause__ is CLOSED


def test_the_first_reason_counts_not_what_followed_from_it(pair: tuple[Liveness, Liveness]) -> None:
    first, second = pair
    second.last_words(RankLostError("rank 1 (update, step 12) lost another rank: rank 7 stopped: ValueError: no"))
    lost = first.lost_rank_behind(CLOSED)
    assert "rank 1 stopped: RankLostError: rank 1 (update, step 12) lost another rank: rank 7 stopped" in str(lost)


def test_words_of_an_error_that_was_dealt_with_are_taken_back(pair: tuple[Liveness, Liveness]) -> None:
    _, second = pair
    with pytest.raises(MemoryError), second.doing("training_step"):
        raise MemoryError
    assert second._describe(0).words == "MemoryError: "
    with second.doing("training_step"):
        assert second._describe(0).words is None


def test_a_rank_that_is_fine_is_named_with_what_it_does_and_for_how_long(
    pair: tuple[Liveness, Liveness], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair
    monkeypatch.setattr("lightning_hybrid.strategy.liveness.PATIENCE", 1.5)
    second.say("reward")
    second._doing = (second._doing[0], time.monotonic() - 610)
    assert "rank 1 is alive but has been in reward, step 12 for 61" in str(first.lost_rank_behind(CLOSED))


def test_a_silent_rank_is_named_with_what_it_did_last(pair: tuple[Liveness, Liveness]) -> None:
    first, second = pair
    second.say("rollout")
    second._left = True  # its thread ends; then the farewell is forgotten
    second._beats.join(timeout=5)
    told = Beat(99, "rollout, step 12", 3.0)
    first._beats.heard[1] = Heard(told, first._attention)
    second._beats._store.set("1", '{"count": 99, "doing": "rollout, step 12", "seconds": 3.0}')
    lost = str(first.lost_rank_behind(CLOSED))
    assert "rank 1 has not been heard of for 5 s; it was last in rollout, step 12: killed, stopped or cut off" in lost


def test_doing_is_nested(pair: tuple[Liveness, Liveness]) -> None:
    first, _ = pair
    with first.doing("optimizer_step"):
        with first.doing("training_step"):
            assert first._doing[0] == "training_step, step 12"
        assert first._doing[0] == "optimizer_step, step 12"
    assert first._doing[0] == "after optimizer_step, step 12"


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:94"


@pytest.mark.parametrize(
    "error",
    [
        RewardError("gloo"),
        ConnectionResetError("Connection reset by peer"),
        RuntimeError("no"),
        RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 1 (expected (2), got (3))"),
        RuntimeError("Invalid scalar type: gloo has an unsupported reduction operation"),
        RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 40 vs 20"),
        RuntimeError("Check failed: the nccl communicator has no such device"),
        RuntimeError("Distributed package doesn't have NCCL built in"),
        RuntimeError("DataLoader timed out after 120 seconds"),
        DistBackendError(f"{NCCL}, invalid usage, NCCL version 2.27.5"),
        DistBackendError(f"{NCCL}, unhandled cuda error\nCuda failure 2 'out of memory'"),
        torch.OutOfMemoryError("CUDA out of memory. gloo/transport"),
        RuntimeError("[gloo/transport/tcp/buffer.cc:1] std::bad_alloc"),
    ],
)
def test_errors_of_ones_own_are_nobodys_loss(error: Exception) -> None:
    assert not is_failed_collective(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{PAIR} Connection closed by peer [127.0.0.1]:1234"),
        RuntimeError(f"{PAIR} Read error [127.0.0.1]:1234: No route to host"),
        RuntimeError("Timed out waiting 8000ms for recv operation to complete"),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("writev [127.0.0.1]:1234: Broken pipe"),
        RuntimeError("Operation timed out!"),
        DistBackendError(f"{NCCL}, remote process exited or there was a network error, NCCL version 2.27.5"),
        DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 8001 ms"),
        DistBackendError("NCCL communicator was aborted on rank 1."),
        DistBackendError("retrieving ncclUniqueId from [0] but store->get('0') got error: wait timeout after 8000ms"),
        torch.distributed.DistStoreError("wait timeout after 8000ms, keys: /1"),
        torch.distributed.DistNetworkError("Failed to recv, got 0 bytes."),
    ],
)
def test_errors_of_collectives_are_known(error: Exception) -> None:
    assert is_failed_collective(error)


def test_a_store_that_failed_is_connected_to_anew(pair: tuple[Liveness, Liveness]) -> None:
    first, second = pair
    failed = threading.Event()

    class Broken:
        def set(self, key: str, value: str) -> None:
            failed.set()
            raise torch.distributed.DistNetworkError("Broken pipe")

    first._beats._store = Broken()
    first._beats.now(patience=5)
    assert failed.wait(5)
    deadline = time.monotonic() + 10
    while first._beats.failure is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second.say("reward")
    second._beats.now(patience=5)
    first._beats.now(patience=5)
    assert first._beats.heard[1].beat.doing == "reward, step 12"


def test_a_rank_that_waits_too_long_says_once_where_the_others_are(
    pair: tuple[Liveness, Liveness], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    second.say("reward")
    second._beats.now(patience=5)
    first._beats.now(patience=5)
    with first.doing("optimizer_step"):
        first._doing = (first._doing[0], time.monotonic() - 610)
        time.sleep(3 * INTERVAL)
    said = "lightning-hybrid: rank 0 has been in optimizer_step, step 12 for 61"
    err = capfd.readouterr().err
    assert err.count(said) == 1
    assert "s, longer than the timeout of 600 s: rank 1 is alive but has been in reward, step 12 for" in err


def test_a_closed_stderr_ends_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", write)
    write_to_stderr("rank 1 was killed")


def test_the_end_of_a_process_is_said_in_words() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-signal.SIGKILL) == "was killed by SIGKILL"
    assert how_it_ended(-40) == "was killed by signal 40"  # a real-time signal without a name


@pytest.mark.usefixtures("alone_in_group")
@pytest.mark.parametrize(("backend", "seconds"), [("cpu:gloo", 100), ("cpu:gloo,cuda:nccl", 100 + GRACE + 5)])
def test_nccl_ends_a_process_only_after_the_watch_has_spoken(
    backend: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[timedelta] = []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: backend)
    monkeypatch.setattr(distributed_c10d, "_set_pg_timeout", lambda timeout, group: given.append(timeout))
    limit_collectives(timedelta(seconds=100))
    assert set(given) == {timedelta(seconds=seconds)}


def test_a_rank_alone_has_no_threads_for_it() -> None:
    found: list[Any] = []

    class Watching(Regression):
        def on_train_start(self) -> None:
            found.append(self.trainer.strategy.liveness)
            found.extend(thread for thread in threading.enumerate() if "ranks" in thread.name)

    quiet_trainer(HybridDeepSpeedStrategy(), max_steps=1).fit(Watching(), random_batches(), random_batches(seed=2))
    assert found == [None]
