"""Weights that nothing trains: kept as a fingerprint, or in full."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.checkpoint.fragments import own_share
from lightning_hybrid.checkpoint.tensors import Stretches
from lightning_hybrid.errors import CheckpointError

CHUNK = 1 << 22
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, and far from any pattern in floating-point numbers; the first is 2**64 divided by the golden ratio.
FACTOR, STEP = 0x9E3779B97F4A7C15 - (1 << 64), 0x5851F42D4C957F2D


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require no gradient."""
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """One digest of the frozen parameters of modules, in hexadecimal, see :func:`fingerprints`."""
    named = json.dumps([fingerprints(module) for module in modules], sort_keys=True)
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def fingerprints(module: nn.Module) -> dict[str, str]:
    """A 64-bit digest of each frozen parameter's bits, in hexadecimal; the same however it is sharded.

    The digest is a sum over elements of their bits times a factor of their position, modulo 2**64, so that ranks add up
    theirs. It tells apart models that differ by accident, not those that someone made alike on purpose. With ZeRO-3 all
    ranks call it.
    """
    names, sums, sharded = [], [], False
    for name, start, values, is_share in _own_stretches(module):
        names.append(name)
        sums.append(_digest(values, start))
        sharded = sharded or is_share
    total = torch.tensor(sums, dtype=torch.int64)
    if sharded and torch.distributed.get_world_size() > 1:
        total = _summed(total)
    return {name: f"{value & (1 << 64) - 1:016x}" for name, value in zip(names, total.tolist(), strict=True)}


def frozen_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """This rank's share of the frozen parameters, one-dimensional, and where each share begins."""
    tensors, starts = {}, {}
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, start, values, is_share in _own_stretches(module):
        if not is_share:  # every rank has all of it
            begin, end = (values.numel() * r // ranks for r in (rank, rank + 1))
            start, values = begin, values[begin:end]
        tensors[name], starts[name] = values, start
    return tensors, starts


def restore_frozen(module: nn.Module, stretches: Stretches) -> None:
    """Fill the frozen parameters from a checkpoint that holds them in full."""
    with torch.no_grad():
        for name, start, values, _ in _own_stretches(module):
            stretches.read_into(name, start, values)


def refuse_other_weights(of: str, module: nn.Module, saved: Mapping[str, str]) -> None:
    """Raise where a frozen model is not the one that a checkpoint was written with.

    Raises:
        CheckpointError: naming the first parameters that differ.
    """
    mine = fingerprints(module)
    different = sorted(name for name in mine.keys() | saved.keys() if mine.get(name) != saved.get(name))
    if different:
        listed = ", ".join(repr(name) for name in different[:3])
        raise CheckpointError(
            f"frozen weights of {of!r} are not those that the checkpoint was written with ({len(different)} of "
            f"{len(saved)} parameters differ: {listed}): give the same model and precision, or write checkpoints with "
            "strategy.checkpoint.frozen_models=value, which hold them"
        )


def _own_stretches(module: nn.Module) -> Iterator[tuple[str, int, Tensor, bool]]:
    """Name, start, one-dimensional values, and whether they are this rank's share only, in the order of the names."""
    parameter: Any  # with ZeRO-3's own attributes
    for name, parameter in sorted(frozen_parameters(module).items()):
        if hasattr(parameter, "ds_id"):
            start, numel = own_share(parameter, torch.distributed.get_rank())
            yield name, start, parameter.ds_tensor.detach().view(-1)[:numel], True
        else:
            yield name, 0, parameter.detach().reshape(-1), False


def _digest(values: Tensor, start: int) -> int:
    total = 0
    for begin in range(0, values.numel(), CHUNK):
        chunk = values[begin : begin + CHUNK].contiguous()
        bits = chunk.view(INTEGERS[chunk.element_size()]).to(torch.int64)
        position = torch.arange(start + begin, start + begin + bits.numel(), device=bits.device)
        total += int(((bits + 1) * (position * STEP | 1) * FACTOR).sum())
    total &= (1 << 64) - 1
    return total - (1 << 64) if total >= 1 << 63 else total


def _summed(values: Tensor) -> Tensor:
    from deepspeed.accelerator import get_accelerator

    held = values.to(get_accelerator().current_device_name())
    torch.distributed.all_reduce(held)
    return held.cpu()
