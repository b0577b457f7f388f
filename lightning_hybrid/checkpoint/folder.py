"""Checkpoint folders: written beside and renamed when complete, found again, checked."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_hybrid.checkpoint.manifest import entries, problem_of, read_manifest
from lightning_hybrid.errors import CheckpointError

INCOMPLETE, REPLACED = ".incomplete-", ".replaced"


def beside(target: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return target.parent / f"{INCOMPLETE}{_tag(target)}"


def begin(target: Path) -> Path:
    """Make the empty folder to write to; what an interrupted writer left there is removed.

    Raises:
        CheckpointError: if the folder cannot be made.
    """
    folder = beside(target)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint beside '{target}': {error}") from error
    return folder


def complete(target: Path) -> None:
    """Give the written folder its name; what stood there before is removed after that, not before.

    A process killed in between leaves the older checkpoint as ``<name>.replaced<suffix>``, complete, and under a name
    that Lightning also takes for "last" where it was.
    """
    replaced = target.with_name(f"{target.stem}{REPLACED}{target.suffix}")
    if target.is_symlink() or target.is_file():
        target.unlink()
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # not before: it may be the only complete one
        target.rename(replaced)
    try:
        beside(target).rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what interrupted writers left in a folder of checkpoints, of which this process is the only writer."""
    for left in folder.glob(f"{INCOMPLETE}*"):
        shutil.rmtree(left, ignore_errors=True)


def discard(target: Path) -> None:
    """Remove what was written of a checkpoint that failed."""
    shutil.rmtree(beside(target), ignore_errors=True)


def problems(folder: Path, *, content: bool = True) -> list[str]:
    """All that is wrong with a checkpoint; empty where it is what was written.

    Args:
        folder: the checkpoint's.
        content: read the files, rather than their sizes only.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    return _problems_of_files(folder, manifest, content=content)


def _problems_of_files(folder: Path, manifest: Mapping[str, Any], *, content: bool) -> list[str]:
    found = (problem_of(folder, entry, content=content) for entry in entries(manifest))
    return [problem for problem in found if problem is not None]


def newest_complete(folder: Path | str, besides: Path | None = None) -> Path | None:
    """The checkpoint in ``folder`` that was written last and has every file in full size; None for none.

    By time, not by steps: a folder may hold those of an earlier run, or of a branch that was left.

    Args:
        folder: of checkpoints.
        besides: one to leave out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = []
    for entry in sorted(folder.iterdir()):
        hidden = entry.name.startswith(".") or entry.is_symlink() or not entry.is_dir()
        if hidden or (besides is not None and entry.resolve() == besides.resolve()):
            continue
        manifest = _manifest_of_complete(entry)
        if manifest is not None:
            found.append((entry.stat().st_mtime_ns, int(manifest["global_step"]), entry))
    return max(found)[2] if found else None


def _manifest_of_complete(folder: Path) -> dict[str, Any] | None:
    """None where it cannot be read, or a file that it lists is not there in full size."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return None
    return None if _problems_of_files(folder, manifest, content=False) else manifest


def refused(folder: Path, what: str) -> CheckpointError:
    """The error of a checkpoint that is not what was written; offers the newest complete one beside it."""
    other = newest_complete(folder.parent, besides=folder)
    offer = (
        f"the newest complete one beside it is '{other}': give ckpt_path='{other}'"
        if other
        else "none beside it is complete"
    )
    return CheckpointError(f"checkpoint '{folder}' is refused: {what}; {offer}")


def _tag(target: Path) -> str:
    return hashlib.sha256(target.name.encode()).hexdigest()[:12]


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, last when the machine stops."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
