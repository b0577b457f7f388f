"""Links to checkpoints, which never dangle for want of time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn


def link(folder: str | Path, target: str | Path, name: str) -> None:
    """Make ``<folder>/<name>.ckpt`` point at a checkpoint; a file system without links is warned of, no more."""
    path = Path(folder) / f"{name}.ckpt"
    try:
        replace_link(path, os.path.relpath(target, folder))
    except OSError as error:
        rank_zero_warn(f"no link {path} to the {name} checkpoint: {error}; 'ckpt_path={name}' finds it without")


def replace_link(link: Path, target: str) -> None:
    """Make ``link`` point at ``target``; at no time is there no link.

    Args:
        link: a symbolic link, a folder from before there were links, or nothing.
        target: what it points at, relative to the link's folder.
    """
    new, old = link.with_name(f"{link.name}.new"), link.with_name(f"{link.name}.old")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
        link.rename(old)
    new.replace(link)
    shutil.rmtree(old, ignore_errors=True)
