"""Folders that hold an adapter and no whole model: where its base is, whether it is the one, and both as one model."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.adapters import is_fingerprint_of, wrapped

LOGGER = logging.getLogger("lightning_hybrid")
ADAPTER_CONFIG = "adapter_config.json"
EXPORT_RECORD = "export.json"
"""beside an adapter that was exported: which base it was trained on"""


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    folder = Path(path)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_config(folder: str | Path) -> Any:
    """peft's configuration of an adapter folder.

    Raises:
        ConfigError: if it cannot be read.
    """
    import peft

    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"'{folder}/{ADAPTER_CONFIG}' cannot be read: {error}") from error


def base_of_adapter(folder: str | Path, base: str | None = None) -> str:
    """Where the base of an adapter folder lies: what is given, what the adapter names, or where it lay beside it.

    Raises:
        ConfigError: if the adapter names none.
    """
    if base is not None:
        return base
    named = adapter_config(folder).base_model_name_or_path
    beside = _recorded_base(folder).get("relative")
    if not named and not beside:
        raise ConfigError(f"adapter '{folder}' names no base: give model.base, the model that it was trained on")
    if beside and not (named and Path(named).is_dir()) and (Path(folder) / beside).is_dir():
        return str(os.path.normpath(Path(folder) / beside))
    return str(named)


def apply_adapter(model: Any, folder: str | Path, base: str) -> Any:
    """Merge an adapter folder into its base, in the base's own precision (float32 as this house loads it).

    Args:
        model: the base; its weights are changed.
        folder: of the adapter.
        base: name of the base, for messages.

    Returns:
        The plain model with the adapter in its weights.

    Raises:
        ConfigError: if it is not the base that the adapter was trained on.
    """
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    _refuse_another_base(model, folder, base)
    try:
        adapted = wrapped(model, adapter_config(folder))
        saved = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError) as error:
        raise ConfigError(f"adapter '{folder}' cannot be put on '{base}': {error}") from error
    _refuse_other_shapes(get_peft_model_state_dict(adapted, save_embedding_layers=False), saved, folder, base)
    set_peft_model_state_dict(adapted, saved)
    merged = adapted.merge_and_unload()
    merged.name_or_path = merged.config.name_or_path = str(folder)
    return merged


def _recorded_base(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / EXPORT_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    base = (record.get("base") or {}) if isinstance(record, dict) else None
    if not isinstance(base, dict):
        raise ConfigError(f"'{path}' is no record of an export: take it away if another program wrote it")
    return base


def _refuse_another_base(model: Any, folder: str | Path, base: str) -> None:
    saved = _recorded_base(folder).get("fingerprint")
    if saved is None:
        if not getattr(rank_zero_only, "rank", 0):
            LOGGER.warning(
                f"adapter '{folder}' does not say which weights it was trained on: of '{base}' only the shapes are "
                "checked; make sure that it is the base"
            )
    elif not is_fingerprint_of(str(saved), model):
        raise ConfigError(
            f"adapter '{folder}' was not trained on the weights of '{base}': their fingerprints differ (was it trained "
            "again, or is it another model?); give model.base, the model that it was trained on"
        )


def _refuse_other_shapes(mine: dict[str, Tensor], saved: dict[str, Tensor], folder: str | Path, base: str) -> None:
    problems = [f"{name!r} is not in the adapter" for name in sorted(mine.keys() - saved.keys())]
    problems += [f"{name!r} has no place in the base" for name in sorted(saved.keys() - mine.keys())]
    problems += [
        f"{name!r} has shape {tuple(saved[name].shape)}, on this base {tuple(mine[name].shape)}"
        for name in sorted(mine.keys() & saved.keys())
        if mine[name].shape != saved[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(
            f"adapter '{folder}' does not fit '{base}': {'; '.join(problems[:3])}{more}; give model.base, the model "
            "that it was trained on"
        )
