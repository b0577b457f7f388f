"""What runs inside the workers of a vLLM engine in a process of its own; vLLM calls it with the worker."""

from __future__ import annotations

from typing import Any

from lightning_hybrid.rollout.vllm.engine import take_weights
from lightning_hybrid.rollout.vllm.transfer import Announced, Meeting, WeightGroup, receive


def join_group(worker: Any, meeting: dict[str, Any], first: int, host: str) -> None:
    """Meet rank 0 and the other workers, and part from those that were met before.

    Args:
        worker: of vLLM.
        meeting: fields of a :class:`~lightning_hybrid.rollout.vllm.transfer.Meeting`.
        first: number in the group of this engine's first worker.
        host: own address that the others reach.
    """
    leave_group(worker)
    worker.weight_group = WeightGroup(Meeting(**meeting), first + worker.rank, worker.device, host)


def leave_group(worker: Any) -> None:
    """Part from the group, so that nobody waits for this worker."""
    group, worker.weight_group = getattr(worker, "weight_group", None), None
    if group is not None:
        group.close()


def receive_weights(worker: Any, announced: Announced, bucket_bytes: int) -> list[str]:
    """Load weights as they come from rank 0; which of its own were not among them.

    Args:
        worker: of vLLM.
        announced: what comes.
        bucket_bytes: at a time.
    """
    weights = receive(announced, bucket_bytes, worker.weight_group)
    try:
        missing = take_weights(worker, weights)
        for _ in weights:  # what it did not ask for is sent all the same
            pass
    except BaseException:
        leave_group(worker)
        raise
    return sorted(missing)
