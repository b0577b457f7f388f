"""Weights go out as one stream of bytes, in buckets, to a group of real members."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from lightning_hybrid.rollout.vllm.transfer import (
    GroupError,
    Meeting,
    WeightGroup,
    open_store,
    receive,
    send,
)

CPU, HOST = torch.device("cpu"), "127.0.0.1"
WEIGHTS = {
    "embedding": torch.randn(40, 5),
    "scale": torch.tensor(3.0, dtype=torch.float64),
    "half": torch.randn(7, 3).bfloat16(),
    "empty": torch.zeros(0, 4),
    "turned": torch.randn(6, 5).T,
}
ANNOUNCED = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in WEIGHTS.items()]


def group_of(members: int, task: Callable[[WeightGroup], Any]) -> tuple[WeightGroup, list[Future[Any]]]:
    """Rank 0's group, and what the other members make of theirs in threads."""
    store, port = open_store(HOST, 20.0)
    meeting = Meeting(HOST, port, members, 20.0)
    threads = ThreadPoolExecutor(members)
    others = [
        threads.submit(lambda rank=rank: task(WeightGroup(meeting, rank, CPU, HOST))) for rank in range(1, members)
    ]
    return WeightGroup(meeting, 0, CPU, HOST, store), others


@pytest.mark.parametrize("size", [8, 60, 1 << 20])
def test_tensors_arrive_as_they_are_whatever_a_bucket_holds(size: int) -> None:
    sent: list[int] = []

    def taken(group: WeightGroup) -> dict[str, Tensor]:
        got = {name: tensor.clone() for name, tensor in receive(ANNOUNCED, size, group)}
        group.close()
        return got

    group, others = group_of(3, taken)

    def broadcast(bucket: Tensor) -> None:
        sent.append(len(bucket))
        group.broadcast(bucket)

    send(WEIGHTS.items(), torch.empty(size, dtype=torch.uint8), broadcast)
    for other in others:
        got = other.result(20)
        assert all(torch.equal(got[name], tensor) for name, tensor in WEIGHTS.items())
        assert all(got[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items())
    assert sum(sent) == sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert max(sent) <= size
    group.close()


def test_nobody_waits_for_a_member_that_parted() -> None:
    gone = threading.Event()

    def leave(group: WeightGroup) -> None:
        group.close()
        gone.set()

    group, _ = group_of(2, leave)
    assert gone.wait(20)
    much = [("much", torch.zeros(1 << 23))]  # the first bytes may still find room on the way
    with pytest.raises(GroupError, match="weights could not be passed on"):
        send(much, torch.empty(1 << 22, dtype=torch.uint8), group.broadcast)
    group.close()


def test_the_store_listens_on_loopback_only() -> None:
    store, port = open_store(HOST, 20.0)
    listening = [c.laddr for c in psutil.Process(os.getpid()).net_connections("inet") if c.status == "LISTEN"]
    assert [address.ip for address in listening if address.port == port] == [HOST]
    store.set("a", "b")
