"""Weights in safetensors files, as Hugging Face names and splits them, gathered and written one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.checkpoint.tensors import DTYPES
from lightning_hybrid.errors import CheckpointError
from lightning_hybrid.models.merging import Entry

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a file: what its header says."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(
    folder: Path, slots: Sequence[Slot], values: Iterator[Tensor], stem: str = "model", limit: int = SHARD_BYTES
) -> None:
    """Write ``<stem>.safetensors``; above ``limit`` bytes, several files and ``<stem>.safetensors.index.json``.

    Args:
        folder: that is there.
        slots: of all tensors, in their order.
        values: the tensors, one after another; each is let go before the next is asked for.
        stem: of the files' names.
        limit: bytes of the tensors of one file, unless one tensor alone has more.
    """
    shards = _shards(slots, limit)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", shards[0], values)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, values)
        places |= {slot.name: name for slot in shard}
    index = {"metadata": {"total_size": sum(slot.bytes for slot in slots)}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(slots: Sequence[Slot], limit: int) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.bytes
    return shards


def _write_file(path: Path, slots: Sequence[Slot], values: Iterator[Tensor]) -> None:
    with path.open("wb") as file:
        file.write(_header(slots))
        for slot in slots:
            tensor = next(values)
            if (tuple(tensor.shape), tensor.dtype) != (slot.shape, slot.dtype):
                raise CheckpointError(
                    f"{slot.name!r} is {tensor.dtype} {tuple(tensor.shape)}, and {slot} was announced"
                )
            if tensor.numel():
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _header(slots: Sequence[Slot]) -> bytes:
    """Its length, then what Transformers looks for, and where each tensor lies."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for slot in slots:
        if slot.dtype not in DTYPES:
            raise CheckpointError(f"tensor {slot.name!r} is of type {slot.dtype}, which safetensors cannot hold")
        begin, end = end, end + slot.bytes
        header[slot.name] = {"dtype": DTYPES[slot.dtype], "shape": list(slot.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values are aligned
    return len(text).to_bytes(8, "little") + text


# ---- from a model, whose tensors may be sharded ---------------------------------------------------------------------


def slots_of(entries: Sequence[Entry]) -> list[Slot]:
    """What the files will hold."""
    return [Slot(entry.name, entry.shape, entry.dtype) for entry in entries]


def gathered_values(entries: Sequence[Entry], *, keep: bool) -> Iterator[Tensor | None]:
    """Each entry's tensor in host memory; with ZeRO-3 all ranks go through all of them, together.

    Args:
        entries: in the same order on every rank.
        keep: whether this rank wants them; None otherwise.
    """
    for entry in entries:
        yield entry.value(lambda part: on_host(part, keep=keep))


def on_host(tensor: Any, *, keep: bool) -> Tensor | None:
    """A copy in host memory; a ZeRO-3 parameter is whole on the device for as long as that takes, and no other is."""
    if not hasattr(tensor, "ds_id"):
        return _copied(tensor) if keep else None
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    if tensor.ds_status == ZeroParamStatus.AVAILABLE:  # one that ZeRO-3 never shards, being small
        return _copied(tensor) if keep else None
    with deepspeed.zero.GatheredParameters([tensor]):
        return _copied(tensor) if keep else None


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def converted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of a model's tensors as its family is published."""
    from transformers.core_model_loading import revert_weight_conversion

    published: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return published
