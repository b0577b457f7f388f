"""One folder per checkpoint: each engine's shards, and Lightning's own state beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hybrid.errors import StrategyError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LIGHTNING_FILE = "lightning.ckpt"
ENGINES_FOLDER = "engines"
TAG = "weights"


def save_run(
    folder: str | Path, state: Mapping[str, Any], engines: Mapping[str, DeepSpeedEngine], *, is_writer: bool
) -> None:
    """Write every engine's weights and optimizer state, and Lightning's state (loops, callbacks, schedulers).

    Args:
        folder: the checkpoint's folder, the same on every rank.
        state: what ``Trainer`` dumped.
        engines: all engines; every rank writes its own shards.
        is_writer: whether this rank writes what is the same on all ranks.
    """
    folder = Path(folder)
    for name, engine in engines.items():
        engine.save_checkpoint(str(folder / ENGINES_FOLDER / (name or "module")), tag=TAG)
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), folder / LIGHTNING_FILE)


def load_run(folder: str | Path, engines: Mapping[str, DeepSpeedEngine]) -> dict[str, Any]:
    """Load what :func:`save_run` wrote into the engines, and return Lightning's state.

    Raises:
        StrategyError: if the folder is not such a checkpoint, or lacks an engine; names what is missing.
    """
    folder = Path(folder)
    if not (folder / LIGHTNING_FILE).is_file():
        raise StrategyError(f"'{folder}' is not a checkpoint of this strategy: it has no {LIGHTNING_FILE}")
    for name, engine in engines.items():
        source = folder / ENGINES_FOLDER / (name or "module")
        if not source.is_dir():
            held = sorted(entry.name for entry in (folder / ENGINES_FOLDER).iterdir())
            raise StrategyError(f"checkpoint '{folder}' has no engine {name!r}; it has {held}")
        engine.load_checkpoint(str(source), tag=TAG)
    state: dict[str, Any] = torch.load(folder / LIGHTNING_FILE, map_location="cpu", weights_only=True)
    return state


def state_outside_engines(module: nn.Module, owned: Iterable[str]) -> dict[str, Any]:
    """The state dict of ``module`` less everything inside the submodules named in ``owned``."""
    names = list(owned)
    if "" in names:
        return {}
    prefixes = tuple(f"{name}." for name in names)
    return {key: value for key, value in module.state_dict().items() if not (prefixes and key.startswith(prefixes))}
