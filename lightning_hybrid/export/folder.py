"""Folders of exports: replaced only where they hold an earlier export, as it was written, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_hybrid.checkpoint.manifest import digest_of, versions
from lightning_hybrid.errors import ConfigError

RECORD = "export.json"
READ_WHOLE = 16 << 20  # bytes; larger files are weights, whose size is looked at


def write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write down what the folder holds, by which a later export knows that it may replace it."""
    files = {name: _entry(folder / name) for name in _files(folder)}
    content = {**facts, "versions": versions(), "files": files}
    (folder / RECORD).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def refuse_to_replace(folder: Path, reason: str | None) -> None:
    """Raise where something would be lost.

    Args:
        folder: to export to.
        reason: what :func:`reason_to_keep` says of it.

    Raises:
        ConfigError: with the reason.
    """
    if reason is not None:
        raise ConfigError(
            f"cannot export to '{folder}': {reason}; nothing was touched. Give another folder, or move that one away"
        )


def reason_to_keep(folder: Path) -> str | None:
    """Why a folder may not be replaced: it is no export, or one that was added to or changed; None where it may."""
    if folder.is_symlink():
        return "it is a link"
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "it is a file"
    held = _files(folder)
    if not held and not any(folder.iterdir()):
        return None
    written = _written(folder / RECORD)
    if written is None:
        return f"it is not empty and no export (no {RECORD}); it holds {', '.join(held[:4]) or 'folders'}"
    changed = [name for name in held if name not in written or not _is_as_written(folder / name, written[name])]
    return f"it holds '{changed[0]}', which is not as an export wrote it" if changed else None


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in found if path != folder / RECORD)


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"size": size, "sha256": digest_of(path)} if size <= READ_WHOLE else {"size": size}


def _written(record: Path) -> dict[str, dict[str, Any]] | None:
    """What an export wrote; None where there is no record that can be read."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = content.get("files") if isinstance(content, dict) else None
    return files if isinstance(files, dict) else None


def _is_as_written(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and not path.is_symlink() and _entry(path) == entry
