"""Which data a run reads: compared when it goes on from a checkpoint, and between ranks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning_hybrid.engines.agreement import of_all_ranks
from lightning_hybrid.errors import DataError

Fingerprint = dict[str, Any]
"""``files``: of each file its ``name``, ``bytes``, ``rows`` and ``sha256``. ``arguments``: of the data module."""

FIGURES = ("bytes", "rows", "sha256")
CHUNK = 1 << 20


class Files:
    """The files of a data module, as they were before they were read.

    Args:
        names: of the files; one that cannot be read is left to the reader, which says more about it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._before = {name: stamp(name) for name in names}
        self._digests = {name: _digest(name) for name in names if self._before[name] is not None}

    @property
    def elsewhere(self) -> list[str]:
        """Those that are no files here, such as data sets of the hub: told apart by a digest of their rows."""
        return [name for name in self.names if self._before[name] is None]

    def read(self, rows: Mapping[str, int], digests: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """What was read.

        Args:
            rows: number of rows of each file.
            digests: of those that are no files here.

        Raises:
            DataError: if a file was changed meanwhile, so that nobody knows what was read.
        """
        for name in self.names:
            if stamp(name) != self._before[name]:
                raise DataError(f"{name} was changed while it was read: start again when nothing writes to it")
        return [
            {"name": name, "bytes": (self._before[name] or (0, 0))[0], "rows": rows.get(name, 0)}
            | {"sha256": self._digests.get(name) or (digests or {}).get(name, "")}
            for name in self.names
        ]


def stamp(name: str) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in nanoseconds; None where there is no such file or folder."""
    try:
        statuses = [os.stat(file) for file in _files_in(name)]
    except (OSError, ValueError):
        return None
    return sum(status.st_size for status in statuses), max((status.st_mtime_ns for status in statuses), default=0)


def refuse_change(name: str, before: tuple[int, int] | None, opened: int | None = None) -> None:
    """Raise where a file that is read bit by bit is no longer the one that was opened.

    Args:
        name: of the file.
        before: its :func:`stamp` then.
        opened: its descriptor, where it is open.

    Raises:
        DataError: if its size or the time of its last change differ.
    """
    if opened is None:
        now = stamp(name)
    else:
        status = os.fstat(opened)
        now = status.st_size, status.st_mtime_ns
    if now != before:
        raise DataError(f"{name} was changed while it was streamed: start again when nothing writes to it")


def digest_of_rows(rows: Iterable[Mapping[str, object]]) -> str:
    """A digest of the values of rows, for those that come from no file."""
    sha = hashlib.sha256()
    for fields in rows:
        sha.update(json.dumps(fields, sort_keys=True, default=repr).encode())
    return sha.hexdigest()


def _files_in(name: str) -> list[str]:
    """The file itself, or all files of a folder."""
    if not os.path.isdir(name):
        return [name]
    return sorted(os.path.join(folder, file) for folder, _, files in os.walk(name) for file in files)


def _digest(name: str) -> str:
    sha = hashlib.sha256()
    try:
        for part in _files_in(name):
            with open(part, "rb") as file:
                while chunk := file.read(CHUNK):
                    sha.update(chunk)
    except OSError:
        return ""  # the reader reports it
    return sha.hexdigest()


def refuse_other_data(saved: Fingerprint, now: Fingerprint) -> None:
    """Raise where a run would go on with other data than it began with.

    Raises:
        DataError: names each file or argument that differs, what differs about it, and the fix.
    """
    found = differences(saved, now, "in the checkpoint")
    if found:
        listed = "\n".join(f"  {line}" for line in found)
        raise DataError(
            f"the data is not what this run began with:\n{listed}\n"
            "put the data back as it was, or start anew without ckpt_path"
        )


def differences(other: Fingerprint, own: Fingerprint, where: str) -> list[str]:
    """What ``own`` has other than ``other``, which is ``where``; files are compared in order, whatever their names."""
    files, others = own["files"], other["files"]
    found = [_difference(mine, theirs, where) for mine, theirs in zip(files, others, strict=False)]
    if len(files) != len(others):
        found.append(f"files: {_names(files)}; {where}: {_names(others)}")
    for key in sorted({*own["arguments"], *other["arguments"]}):
        mine, theirs = own["arguments"].get(key), other["arguments"].get(key)
        if mine != theirs:
            found.append(f"{key}: {mine!r}; {where}: {theirs!r}")
    return [line for line in found if line]


def _difference(own: Mapping[str, Any], other: Mapping[str, Any], where: str) -> str:
    """Empty where the two files hold the same bytes."""
    if own["sha256"] == other["sha256"]:
        return ""
    return f"{own['name']}: {_figures(own)}; {where}: {_figures(other)}"


def _figures(file: Mapping[str, Any]) -> str:
    return f"{file['bytes']:,} bytes, {file['rows']:,} rows, sha256 {file['sha256'][:12] or 'none'}"


def _names(files: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(file["name"] for file in files) or "none"


def read_alike(read: Callable[[], Fingerprint], *, ranks: int) -> Fingerprint:
    """Read on every rank, and make sure that all have read the same; with several ranks, all must call it.

    Args:
        read: reads, and says what.
        ranks: that read together; with 1 nothing is sent.

    Raises:
        DataError: on every rank, if one cannot read or has read other data than rank 0.
    """
    if ranks == 1:
        return read()
    result: Fingerprint | Exception
    try:
        result = read()
    except Exception as error:
        result = error
    every: list[Fingerprint | str] = of_all_ranks(str(result) if isinstance(result, Exception) else result)
    message = _disagreement(every)
    if message:
        agreed = DataError(message)
        agreed.on_every_rank = True
        raise agreed from (result if isinstance(result, Exception) else None)
    assert not isinstance(result, Exception)
    return result


def _disagreement(every: Sequence[Fingerprint | str]) -> str:
    """What is wrong on which rank; empty where all have read the same."""
    failed = {rank: said for rank, said in enumerate(every) if isinstance(said, str)}
    if len(failed) == len(every) and len({*failed.values()}) == 1:
        return failed[0]
    if failed:
        return "\n".join(f"rank {rank}: {said}" for rank, said in failed.items())
    first, *others = (read for read in every if not isinstance(read, str))
    lines = [
        f"  rank {rank}: {line}"
        for rank, read in enumerate(others, start=1)
        for line in differences(first, read, "on rank 0")
    ]
    listed = "\n".join(lines)
    return f"the ranks have read different data:\n{listed}\ngive every machine the same files" if lines else ""
