"""The random streams of a process: Python's, NumPy's, torch's, the devices', and generators that loaders own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

PYTHON, PYTHON_REST = "python", "python_rest"
NUMPY, NUMPY_REST = "numpy", "numpy_rest"


def capture_streams(generators: Sequence[Generator] = ()) -> dict[str, Tensor]:
    """Where every stream stands, as tensors.

    Args:
        generators: further ones, in an order that a later process repeats.
    """
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        PYTHON: torch.tensor(words, dtype=torch.int64),
        PYTHON_REST: torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        NUMPY: torch.from_numpy(np.asarray(keys).astype(np.int64)),
        NUMPY_REST: torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    for index in range(_devices()):
        state[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    return state | {f"generator:{i}": generator.get_state() for i, generator in enumerate(generators)}


def restore_streams(state: Mapping[str, Tensor], generators: Sequence[Generator] = ()) -> None:
    """Put every stream to where :func:`capture_streams` found it."""
    (gauss,) = state[PYTHON_REST].tolist()
    random.setstate((3, tuple(state[PYTHON].tolist()), None if gauss != gauss else gauss))
    position, has_gauss, cached = state[NUMPY_REST].tolist()
    keys = state[NUMPY].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    for index in range(_devices()):
        if f"cuda:{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{index}"], index)
    restore_generators(state, generators)


def restore_generators(state: Mapping[str, Tensor], generators: Sequence[Generator]) -> None:
    """Put the generators alone to where :func:`capture_streams` found them."""
    for index, generator in enumerate(generators):
        generator.set_state(state[f"generator:{index}"])


def generators_of(loader: Any) -> list[Generator]:
    """The generators that a data loader and its samplers draw from, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, Generator)}
    return list(found.values())


def _devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_initialized() else 0
