"""Ranks that torchrun restarts meet each other, and none of the dead, though the store is that of all starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import Store, TCPStore

from lightning_hybrid.errors import RankLostError
from lightning_hybrid.strategy.meeting import _ask_name, _tell_name, store_of_this_start

RANKS = 3


@pytest.fixture
def agents_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture
def connect(agents_store: TCPStore) -> Callable[[], Store]:
    """Connections of ranks: an operation that waits blocks its own only."""
    return lambda: TCPStore("127.0.0.1", agents_store.port, is_master=False, timeout=timedelta(seconds=20))


@pytest.fixture
def start(connect: Callable[[], Store]) -> Iterator[Callable[[int], Future[str]]]:
    """Start a rank in a thread, which learns the name of its start."""
    with ThreadPoolExecutor(8) as pool:

        def begin(rank: int) -> Future[str]:
            if rank == 0:
                return pool.submit(_tell_name, connect(), RANKS, 20.0)
            return pool.submit(_ask_name, connect(), rank)

        yield begin


def test_all_ranks_of_a_start_learn_its_name_in_whatever_order_they_come(start: Any) -> None:
    names = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        ranks = []
        for rank in order:
            ranks.append(start(rank))
            time.sleep(0.2)
        (name,) = {rank.result(20) for rank in ranks}
        names.append(name)
    assert len(set(names)) == 3


def test_what_ranks_asked_that_died_before_they_met_does_not_matter(connect: Any, start: Any) -> None:
    connect().set("questions/1", "of the dead")
    others = [start(0), start(2)]
    time.sleep(0.3)
    assert not others[0].done()
    assert len({rank.result(20) for rank in (*others, start(1))}) == 1


def test_ranks_that_do_not_come_are_named(connect: Any, start: Any) -> None:
    present = start(1)
    with pytest.raises(RankLostError, match=r"ranks \[2\] did not come to meet the others within 1 s"):
        _tell_name(connect(), RANKS, 1.0)
    assert present.result(20)


def test_only_a_store_that_outlives_ranks_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_of_this_start(LightningEnvironment(), None) is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert store_of_this_start(TorchElasticEnvironment(), None) is None


def test_a_rank_that_hangs_while_it_meets_the_others_is_ended_with_a_word() -> None:
    code = (
        "import time\n"
        "from datetime import timedelta\n"
        "from lightning_hybrid.strategy import lost_ranks\n"
        "lost_ranks.GRACE = 0.5\n"
        "with lost_ranks._meeting(timedelta(seconds=0.25)):\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75
    assert "rank 1 did not meet the others at node1:29500 within 1 s" in ended.stderr
    assert "lightning-hybrid doctor" in ended.stderr
