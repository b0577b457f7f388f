"""Tensors in safetensors files: written in one pass that also takes their digest, read a stretch at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_hybrid.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
STARTS = "starts"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], starts: Mapping[str, int] | None = None
) -> tuple[int, str]:
    """Write tensors as a safetensors file, without a second copy of them in memory.

    Args:
        path: of the file; its folder is made where it is missing.
        tensors: by name, on any device.
        starts: where each tensor begins in the flattened parameter that it is a stretch of.

    Returns:
        The file's bytes, and the SHA-256 of its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _chunks(tensors, starts or {}):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return size, digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor], starts: Mapping[str, int]) -> Iterable[Any]:
    """The file's content: length of the header, header, values."""
    header: dict[str, Any] = {"__metadata__": {STARTS: json.dumps(dict(starts))}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"tensor {name!r} is of type {tensor.dtype}, which checkpoints cannot hold")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values are aligned
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary


class Stretches:
    """Parameters that lie in stretches over several files, put together as they are asked for.

    Args:
        paths: files that :func:`write_tensors` wrote with ``starts``.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: list[Any] = []
        self._where: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for index, path in enumerate(paths):
            file = _opened(path)
            self._files.append(file)
            try:
                for name, start in json.loads((file.metadata() or {}).get(STARTS, "{}")).items():
                    (numel,) = file.get_slice(name).get_shape()
                    self._where[name].append((int(start), numel, index))
            except (AttributeError, TypeError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"'{path}' does not say where its tensors lie: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        """Of everything that has stretches."""
        return sorted(self._where)

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Fill ``target``, one-dimensional, with what begins at ``start``.

        Raises:
            CheckpointError: if the files do not hold all of it.
        """
        left = target.numel()
        for begin, numel, index in self._where[name]:
            low, high = max(begin, start), min(begin + numel, start + target.numel())
            if low < high:
                values = self._files[index].get_slice(name)[low - begin : high - begin]
                target[low - start : high - start].copy_(values)
                left -= high - low
        if left:
            raise CheckpointError(f"{name!r} lacks {left:,} of the elements {start:,} to {start + target.numel():,}")

    def dtype(self, name: str) -> torch.dtype:
        """The type that something was written in."""
        _, _, index = self._where[name][0]
        dtype: torch.dtype = self._files[index].get_slice(name)[0:0].dtype
        return dtype

    def whole(self, name: str, numel: int) -> Tensor:
        """All ``numel`` elements, one-dimensional, in the type that they were written in."""
        target = torch.empty(numel, dtype=self.dtype(name))
        self.read_into(name, 0, target)
        return target


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from error
