"""What a checkpoint folder holds: every file with its size and digest, and what the run was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from lightning_hybrid.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
PACKAGES = ("lightning-hybrid", "lightning", "torch", "deepspeed", "transformers", "peft")
BLOCK = 1 << 22
LONGEST = 200


def _inside(path: str) -> str:
    """A path that stays in the checkpoint's folder."""
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts or "\0" in path:
        raise ValueError("leads out of the folder")
    return path


class _File(BaseModel):
    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Content(BaseModel):
    """What a manifest must hold for a reader to rely on it."""

    model_config = ConfigDict(strict=True, extra="allow")

    global_step: NonNegativeInt
    ranks: PositiveInt
    stage: Annotated[int, Field(ge=0, le=3)]
    engines: list[str]
    loaders: NonNegativeInt
    frozen: dict[str, Literal["value"] | dict[str, str]]
    config: dict[str, Any] | None
    files: dict[Annotated[str, AfterValidator(_inside)], _File]


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint: its path in the folder, its bytes, and the SHA-256 of its content."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: str) -> FileEntry:
        """The entry of a file that is there."""
        return cls(path, (folder / path).stat().st_size, digest_of(folder / path))


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that a checkpoint depends on, where they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # peft is optional
            continue
    return found


def write_manifest(folder: Path, files: Iterable[FileEntry], facts: Mapping[str, Any]) -> None:
    """Write the manifest, with a digest of its own.

    Args:
        folder: the checkpoint's.
        files: all others.
        facts: about the run, of plain types.
    """
    listed = {entry.path: {"size": entry.size, "sha256": entry.sha256} for entry in sorted(files, key=lambda e: e.path)}
    content = {"format": FORMAT, "versions": versions(), **facts, "files": listed}
    text = json.dumps({**content, "digest": _digest(content)}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it is not what was written.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "has no manifest.json: it is not a checkpoint of this strategy, or was never completed"
        raise CheckpointError(f"'{folder}' {what if folder.exists() else 'does not exist'}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise CheckpointError(f"'{path}' is not what was written: its digest differs")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' has format {content.get('format')!r}; this version reads format {FORMAT}")
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:LONGEST].encode(errors="backslashreplace").decode()
        raise CheckpointError(f"'{path}' is no manifest: {where}: {first['msg']}") from error
    return content


def entries(manifest: Mapping[str, Any]) -> list[FileEntry]:
    """The files that a manifest lists, in the order of their paths."""
    return [FileEntry(path, entry["size"], entry["sha256"]) for path, entry in sorted(manifest["files"].items())]


def problem_of(folder: Path, entry: FileEntry, *, content: bool = True) -> str | None:
    """What is wrong with a file, naming it; None where it is what was written.

    Args:
        folder: the checkpoint's.
        entry: what was written.
        content: read the file, rather than its size only.
    """
    path = folder / entry.path
    if not path.is_file():
        return f"'{entry.path}' is missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"'{entry.path}' has {size:,} bytes, {entry.size:,} were written"
    if content and digest_of(path) != entry.sha256:
        return f"'{entry.path}' is not what was written: its SHA-256 differs"
    return None


def _digest(content: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True)
    except ValueError:
        return ""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
