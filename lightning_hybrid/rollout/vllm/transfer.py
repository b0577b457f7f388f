"""Weights from rank 0 to vLLM's workers in other processes: one stream of bytes, broadcast in buckets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from lightning_hybrid.environ import variables

MIB = 1 << 20


@dataclass(frozen=True)
class Meeting:
    """Where the members of a group find each other; JSON can carry its fields.

    Attributes:
        host: that rank 0 listens at.
        port: of it.
        size: members.
        seconds: that any step of theirs may take.
    """

    host: str
    port: int
    size: int
    seconds: float


class GroupError(RuntimeError):
    """Weights did not come through: a member of the group ended, or hangs."""


class WeightGroup:
    """Rank 0 of those that train, and every worker of every engine: gloo on a CPU, NCCL on CUDA.

    It stands beside the process groups of training and of vLLM, and neither knows of it. Its construction ends when
    all members have met.

    Args:
        meeting: of its members.
        rank: in the group; 0 sends.
        device: of the tensors that are sent.
        host: own address that the others reach.
        store: of rank 0, which is where the others find it; None for the others.
    """

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, host: str, store: Any = None) -> None:
        timeout = timedelta(seconds=meeting.seconds)
        if store is None:
            store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout, wait_for_workers=False)
        self.device, self._store = device, store
        make = _nccl if device.type == "cuda" else _gloo
        self._group = make(store, rank, meeting.size, timeout, host)
        self.broadcast(torch.zeros(1, device=device))  # NCCL's members meet in their first collective only

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's bytes into everybody's ``tensor``.

        Raises:
            GroupError: if another member is gone, or time is out.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            self._group.broadcast([tensor], options).wait()
        except RuntimeError as error:
            raise GroupError(f"weights could not be passed on: {error}") from error

    def close(self) -> None:
        """Part, also from members that hang."""
        self._group.abort()
        del self._group, self._store


def _gloo(store: Any, rank: int, size: int, timeout: timedelta, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta, host: str) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # Read as the group is made: a member that is gone is an error of who waits for it. By default it would be one of
    # NCCL's watchdog, which ends the whole process.
    with variables({"TORCH_NCCL_BLOCKING_WAIT": "1"}):
        return dist.ProcessGroupNCCL(store, rank, size, options)


def open_store(host: str, seconds: float) -> tuple[Any, int]:
    """A store that listens at this address only, and its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.bind((host, 0))
    listener.listen()
    port = int(listener.getsockname()[1])
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def send(weights: Iterable[tuple[str, Tensor]], bucket: Tensor, broadcast: Callable[[Tensor], None]) -> None:
    """Send tensors as one stream of bytes, with no regard to where one ends and the next begins.

    Args:
        weights: names, which are known to who receives, and tensors.
        bucket: ``[bytes]`` uint8, that is filled and sent again and again.
        broadcast: sends a tensor.
    """
    used = 0
    for _, tensor in weights:
        left = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        while len(left):
            part = left[: len(bucket) - used]
            bucket[used : used + len(part)].copy_(part)
            used, left = used + len(part), left[len(part) :]
            if used == len(bucket):
                broadcast(bucket)
                used = 0
    if used:
        broadcast(bucket[:used])


Announced = Sequence[tuple[str, str, Sequence[int]]]
"""name, dtype and shape of each tensor"""


def receive(announced: Announced, bucket_bytes: int, group: WeightGroup) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a stream, each in memory of its own: beside one of them there is one bucket.

    Args:
        announced: the tensors that come, in their order.
        bucket_bytes: that a full bucket has.
        group: that they come from.
    """
    left = sum(prod(shape) * _dtype(dtype).itemsize for _, dtype, shape in announced)
    bucket = torch.empty(min(bucket_bytes, left), dtype=torch.uint8, device=group.device)
    fresh = bucket[:0]
    for name, dtype, shape in announced:
        tensor = torch.empty(tuple(shape), dtype=_dtype(dtype), device=group.device)
        wanted = tensor.view(-1).view(torch.uint8)
        while len(wanted):
            if not len(fresh):
                fresh = bucket[:left]
                group.broadcast(fresh)
                left -= len(fresh)
            part = fresh[: len(wanted)]
            wanted[: len(part)].copy_(part)
            wanted, fresh = wanted[len(part) :], fresh[len(part) :]
        yield name, tensor


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
