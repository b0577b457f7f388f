"""Metrics and samples at Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_hybrid.errors import ConfigError

_ID = "wandb-run-id"


def make_wandb(
    folder: str | Path, project: str, offline: bool, resuming: bool, config: Mapping[str, Any] | None = None
) -> Logger:
    """A logger whose run at Weights & Biases is named after the folder, which also keeps its id.

    A resumed run goes on under its id; what was logged after the checkpoint stays there, beside what is logged again.
    What was logged offline lies in ``folder/wandb`` until ``wandb sync`` is called.

    Args:
        folder: of the run.
        project: the run belongs to.
        offline: write to the folder only.
        resuming: whether the run goes on from a checkpoint.
        config: of the run.

    Raises:
        ConfigError: if the package wandb is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError('logger=wandb needs the package wandb: pip install "lightning-hybrid[wandb]"')
    folder = Path(folder)
    identity, known = _identity(folder, resuming)
    return WandbLogger(
        name="/".join(folder.resolve().parts[-2:]),
        save_dir=folder,
        project=project,
        offline=offline,
        id=identity,
        resume="allow" if known else None,
        config=dict(config or {}),
    )


def _identity(folder: Path, resuming: bool) -> tuple[str, bool]:
    """The id of the run, and whether it has been used."""
    path = folder / _ID
    if resuming and path.is_file():
        return path.read_text(encoding="utf-8").strip(), True
    identity = uuid.uuid4().hex[:12]
    _keep(path, identity)
    return identity, False


@rank_zero_only
def _keep(path: Path, identity: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{identity}\n", encoding="utf-8")
