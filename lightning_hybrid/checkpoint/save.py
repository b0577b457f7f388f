"""Write a checkpoint: every rank its own files, one of them the manifest, now or while training goes on."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hybrid.checkpoint import folder as folders
from lightning_hybrid.checkpoint.manifest import MANIFEST, FileEntry, problem_of, write_manifest
from lightning_hybrid.checkpoint.tensors import write_tensors
from lightning_hybrid.engines.agreement import agree, number_of_ranks, of_all_ranks, on_every_rank, own_rank
from lightning_hybrid.errors import CheckpointError

T = TypeVar("T")
PARTS = ".parts"
WRITING = "writing the checkpoint"
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors, see :func:`~lightning_hybrid.checkpoint.tensors.write_tensors`."""

    path: str
    tensors: Mapping[str, Tensor]
    starts: Mapping[str, int] = field(default_factory=dict)

    def copied(self) -> TensorFile:
        """The same on copies in host memory, which training does not touch."""
        return replace(self, tensors={name: t.detach().to("cpu", copy=True) for name, t in self.tensors.items()})


@dataclass(frozen=True)
class Part:
    """What one rank writes.

    Attributes:
        tensors: files of tensors.
        files: the content of other files, by path.
        facts: for the manifest; rank 0's are taken.
    """

    tensors: list[TensorFile]
    files: Mapping[str, bytes]
    facts: Mapping[str, Any]


class CheckpointWriter:
    """Writes checkpoints one after another; removes those that are due once a newer one is complete.

    Args:
        asynchronous: write in a thread, from copies in host memory.
        timeout: seconds that rank 0 waits for the other ranks' files.
    """

    def __init__(self, *, asynchronous: bool = False, timeout: float = 1800.0) -> None:
        self.asynchronous = asynchronous
        self.timeout = timeout
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._due: list[Callable[[], None]] = []
        self._stop = threading.Event()
        self._swept: set[Path] = set()

    def save(self, target: Path, part: Part) -> None:
        """Write a checkpoint; all ranks call it.

        Raises:
            CheckpointError: on every rank where it failed on one, naming it; also for the one before, where that was
                written in a thread. What was complete before is untouched.
        """
        self.wait()
        _together(lambda: self._begin(target))
        if not self.asynchronous:
            entries = _together(lambda: _write(folders.beside(target), part), lambda: folders.discard(target))
            everyones = of_all_ranks(entries)
            _together(lambda: _finish(target, everyones, part), lambda: folders.discard(target))
            return
        part = replace(part, tensors=[file.copied() for file in part.tensors])
        self._thread = threading.Thread(target=self._write_beside_training, args=(target, part), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is complete; all ranks call it.

        Raises:
            CheckpointError: on every rank where it could not be written.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        due, self._due = self._due, []
        agree(error, WRITING, CheckpointError)
        for act in due:
            act()

    def abandon(self, grace: float) -> None:
        """Give the checkpoint that is being written ``grace`` seconds to become complete; then leave it incomplete."""
        if self._thread is None:
            return
        self._thread.join(grace)
        self._stop.set()
        self._thread.join()
        self._thread = None

    def when_complete(self, act: Callable[[], None]) -> None:
        """Do something, but not before the checkpoint that is being written is complete; never where it failed."""
        if self._thread is not None:
            self._due.append(act)
        else:
            act()

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, but not before the one that is being written is complete."""
        self.when_complete(partial(_remove, path))

    def _begin(self, target: Path) -> None:
        if own_rank() != 0:
            return
        if target.parent not in self._swept:
            self._swept.add(target.parent)
            folders.sweep(target.parent)
        folders.begin(target)

    def _write_beside_training(self, target: Path, part: Part) -> None:
        """The thread: ranks tell each other by files how they fare, as collectives are the training's."""
        folder = folders.beside(target)
        try:
            try:
                report: Any = [vars(entry) for entry in _write(folder, part)]
            except Exception as error:
                report = f"rank {own_rank()}: {error}"
                self._error = error
            _leave_report(folder / PARTS, report)
            if own_rank() == 0:
                _finish(target, self._await_reports(folder / PARTS), part)
        except Exception as error:
            self._error = self._error or error
            folders.discard(target)

    def _await_reports(self, folder: Path) -> list[list[FileEntry]]:
        """Every rank's entries, once all are there."""
        deadline = time.monotonic() + self.timeout
        missing = set(range(number_of_ranks()))
        reports: dict[int, Any] = {}
        while missing:
            for rank in [r for r in missing if (folder / f"{r:05d}.json").exists()]:
                reports[rank] = json.loads((folder / f"{rank:05d}.json").read_text(encoding="utf-8"))
                missing.remove(rank)
            if not folder.parent.is_dir():  # another rank could not even leave its report
                raise CheckpointError(f"another rank gave up writing '{folder.parent}'; its own message says why")
            if missing and (time.monotonic() > deadline or self._stop.wait(POLL_SECONDS)):
                raise CheckpointError(f"ranks {sorted(missing)} did not write their files in time")
        failed = [report for report in reports.values() if isinstance(report, str)]
        if failed:
            raise CheckpointError("; ".join(failed))
        return [[FileEntry(**entry) for entry in reports[rank]] for rank in sorted(reports)]


def _write(folder: Path, part: Part) -> list[FileEntry]:
    """Write a rank's files; the entry of each."""
    entries = []
    for file in part.tensors:
        with _naming(folder / file.path):
            entries.append(FileEntry(file.path, *write_tensors(folder / file.path, file.tensors, file.starts)))
    for path, content in part.files.items():
        with _naming(folder / path):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
            folders.sync(folder / path)
            entries.append(FileEntry.of(folder, path))
    return entries


class _naming:
    """Turn the system's errors into ours, with the file and the free space."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "write" in str(error)):
            near = next(p for p in (self.path, *self.path.parents) if p.exists())
            free = shutil.disk_usage(near).free
            raise CheckpointError(
                f"cannot write '{self.path.name}' of a checkpoint ({error}; {free / 2**20:,.0f} MiB free): "
                "make room or choose another folder; checkpoints written before are untouched"
            ) from error


def _finish(target: Path, entries: list[list[FileEntry]], part: Part) -> None:
    """Rank 0: check that everyone's files are there, list them, give the folder its name."""
    if own_rank() != 0:
        return
    folder, files = folders.beside(target), [entry for rank in entries for entry in rank]
    missing = [p for p in (problem_of(folder, entry, content=False) for entry in files) if p is not None]
    if missing:
        raise CheckpointError(
            f"rank 0 does not see what other ranks wrote under '{folder.parent}': {missing[0]}; "
            "use a folder that all machines share"
        )
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    with _naming(folder / MANIFEST):
        write_manifest(folder, files, part.facts)
        folders.sync(folder / MANIFEST)
        for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            folders.sync(inner)
        folders.complete(target)


def _leave_report(folder: Path, report: Any) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{own_rank():05d}.json"
    path.with_suffix(".new").write_text(json.dumps(report), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)


def _together(act: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
    """What ``act`` returns; where it fails on one rank, every rank raises, after rank 0 has done ``undo``."""
    try:
        return on_every_rank(act, WRITING, CheckpointError)
    except CheckpointError:
        if own_rank() == 0:
            undo()
        raise


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # on one rank alone, and the newer one is complete
        rank_zero_warn(f"checkpoint '{path}' is due to be removed and could not be: {error}")
