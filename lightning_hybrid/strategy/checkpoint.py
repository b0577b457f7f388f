"""One folder per checkpoint: each engine's shards, and Lightning's own state beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hybrid.engines import gathered
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
    if not engines:
        raise StrategyError("there is nothing to save: engines exist only during fit; use ModelCheckpoint, or HFExport")
    folder = Path(folder)
    for name, engine in engines.items():
        engine.save_checkpoint(str(folder / ENGINES_FOLDER / (name or "module")), tag=TAG)
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), folder / LIGHTNING_FILE)


def load_engines(folder: str | Path, engines: Mapping[str, DeepSpeedEngine]) -> None:
    """Load weights and optimizer states into the engines.

    Raises:
        StrategyError: if the folder is not such a checkpoint, or lacks an engine; names what is missing.
    """
    sources = _engine_folders(folder)
    for name, engine in engines.items():
        source = sources.get(name or "module")
        if source is None:
            raise StrategyError(f"checkpoint '{folder}' has no engine {name!r}; it has {sorted(sources)}")
        loaded, _ = engine.load_checkpoint(str(source), tag=TAG)
        if loaded is None:
            raise StrategyError(f"checkpoint '{source}' could not be loaded: it is incomplete; use an earlier one")


def load_modules(folder: str | Path, root: nn.Module) -> None:
    """Load the weights of every engine of a checkpoint into the modules they belong to, to evaluate them.

    Raises:
        StrategyError: if the folder is not such a checkpoint, or holds an engine of which ``root`` has no module.
    """
    known = {name or "module": module for name, module in root.named_modules()}
    for name, source in _engine_folders(folder).items():
        if name not in known:
            raise StrategyError(f"checkpoint '{folder}' has an engine {name!r}, but the module has no such child")
        module = known[name]
        with gathered(module, writable=True):
            module.load_state_dict(_whole_weights(source))


def load_state(folder: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """Lightning's own state; with ``weights_only``, nothing in it is executed."""
    path = _checked(folder) / LIGHTNING_FILE
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only)
    return state


def _checked(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / LIGHTNING_FILE).is_file():
        raise StrategyError(f"'{folder}' is not a checkpoint of this strategy: it has no {LIGHTNING_FILE}")
    return folder


def _engine_folders(folder: str | Path) -> dict[str, Path]:
    engines = _checked(folder) / ENGINES_FOLDER
    if not engines.is_dir():
        raise StrategyError(f"checkpoint '{folder}' has no folder {ENGINES_FOLDER}: it holds no weights")
    return {entry.name: entry for entry in sorted(engines.iterdir())}


def _whole_weights(source: Path) -> dict[str, Any]:
    """The state dict of an engine, put together from its shards where it has any."""
    shards = list((source / TAG).glob("*zero_pp_rank_*_optim_states.pt"))
    if not shards:
        model_file = source / TAG / "mp_rank_00_model_states.pt"
        state: dict[str, Any] = torch.load(model_file, map_location="cpu", weights_only=False)["module"]
        return state
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(source), tag=TAG)
    return whole


def state_outside_engines(module: nn.Module, owned: Iterable[str]) -> dict[str, Any]:
    """The state dict of ``module`` less everything inside the submodules named in ``owned``."""
    names = list(owned)
    if "" in names:
        return {}
    prefixes = tuple(f"{name}." for name in names)
    return {key: value for key, value in module.state_dict().items() if not (prefixes and key.startswith(prefixes))}
