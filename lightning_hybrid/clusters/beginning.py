"""Where ranks begin: in one folder that all of them see, and after a loss from what was kept there."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lightning_hybrid.checkpoint import newest_complete
from lightning_hybrid.config import Run
from lightning_hybrid.engines.agreement import of_all_ranks, on_every_rank, own_rank
from lightning_hybrid.errors import ConfigError

RunT = TypeVar("RunT", bound=Run)
PATIENCE = 60.0  # seconds for a file of another host to show: NFS looks again after half of that
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Mark:
    """The file by which a run knows its folder on every host, and that it has begun before.

    Attributes:
        path: of the file; its name is that of the run.
    """

    path: Path

    @classmethod
    def of(cls, run: Run, run_id: str) -> Mark:
        """That of one command, whose workers may be started several times."""
        return cls(Path(run.output_dir) / f".ray-{run_id}.json")

    def set(self) -> bool:
        """Leave it, with the checkpoints that were there before the run; False where it is there already."""
        if self.path.exists():
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(_stamps(self.path.parent / CHECKPOINTS)))
        new.replace(self.path)
        return True

    def is_seen(self, patience: float) -> bool:
        """Whether it shows on this host, now or soon."""
        deadline = time.monotonic() + patience
        while not self.path.exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True

    def newest_since(self) -> Path | None:
        """The newest complete checkpoint that was written since; None for none."""
        folder = self.path.parent / CHECKPOINTS
        newest = newest_complete(folder)
        before: dict[str, int] = json.loads(self.path.read_text())
        return None if newest is None or before.get(newest.name) == newest.stat().st_mtime_ns else newest


def _stamps(folder: Path) -> dict[str, int]:
    found = folder.iterdir() if folder.is_dir() else ()
    return {entry.name: entry.stat().st_mtime_ns for entry in found if not entry.is_symlink()}


def begin(run: RunT, run_id: str, patience: float = PATIENCE) -> RunT:
    """The settings with which the ranks begin, equal on all of them: after a loss, from the newest checkpoint.

    A collective. Checkpoints that lay there before the run are not its own: until it has written one, it begins where
    it began at first.

    Args:
        run: as the command was given.
        run_id: of the command.
        patience: seconds for the folder of rank 0 to show on another host.

    Raises:
        ConfigError: on every rank, if ``output_dir`` is not the same folder for all.
    """
    mark = Mark.of(run, run_id)
    first = of_all_ranks(on_every_rank(lambda: own_rank() != 0 or mark.set(), "output_dir", ConfigError))[0]
    _refuse_other_folders(run, mark, patience)
    if first:
        return run
    path = of_all_ranks(on_every_rank(lambda: _goes_on_from(run, mark), "output_dir", ConfigError))[0]
    return run.model_copy(update={"ckpt_path": path})


def _goes_on_from(run: Run, mark: Mark) -> str | None:
    if own_rank() != 0:
        return None
    newest = mark.newest_since()
    if newest is None and run.ckpt_path == "last":
        newest = newest_complete(mark.path.parent / CHECKPOINTS)
    if newest is not None:
        return str(newest)
    return None if run.ckpt_path == "last" else run.ckpt_path


def _refuse_other_folders(run: Run, mark: Mark, patience: float) -> None:
    found = of_all_ranks((socket.gethostname(), mark.is_seen(patience)))
    blind = [f"rank {rank} on {host}" for rank, (host, seen) in enumerate(found) if not seen]
    if blind:
        error = ConfigError(
            f"output_dir '{Path(run.output_dir).absolute()}' is not one folder for all ranks: what rank 0 on "
            f"{found[0][0]} wrote there is not seen by {', '.join(blind)}. Give a folder that all nodes share"
        )
        error.on_every_rank = True
        raise error
