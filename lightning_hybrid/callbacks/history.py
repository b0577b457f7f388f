"""The history of a run that was interrupted: written on as if nothing had happened."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_hybrid.strategy.progress import as_between_batches


class History(L.Callback):
    """Make a resumed run log on where its checkpoint was written.

    Metrics are flushed before a checkpoint is written, and what was logged after it is dropped when a run goes on from
    it: :class:`MetricsFile` and :class:`MetricsEvents` can do so. A checkpoint written within a batch, or at the end of
    training, holds the progress of the batches that are done.
    """

    def __init__(self) -> None:
        self._next_row = 0
        self._loaded: int | None = None
        self._between_batches = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop what was logged after the checkpoint, or by an earlier run."""
        loaded, self._loaded = self._loaded, None
        self._next_row = _rows(trainer) if loaded is None else loaded
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile | MetricsEvents):
                logger.rewind(self._next_row)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Give the batch its row: Lightning's own count depends on where in its loop the checkpoint was written."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = self._next_row
        self._between_batches = True

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """The next batch has the next row, unless the two are accumulated."""
        self._next_row = _rows(trainer) + (not trainer.fit_loop._should_accumulate())
        self._between_batches = False

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is written now is the run's last checkpoint."""
        self._between_batches = True

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down all metrics until here before the checkpoint."""
        for logger in trainer.loggers:
            logger.save()
        if self._between_batches:
            as_between_batches(checkpoint["loops"]["fit_loop"], trainer.num_training_batches)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The row of the next batch."""
        return {"next_row": self._next_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that row."""
        self._loaded = int(state_dict["next_row"])


def _rows(trainer: L.Trainer) -> int:
    """The number that loggers get as ``step``."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


class MetricsFile(CSVLogger):
    """``<folder>/metrics.csv``, one row per logged step, which a resumed run continues.

    Args:
        folder: where the file stands.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="")

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> MetricsWriter:
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def rewind(self, row: int) -> None:
        """Drop the rows of step ``row`` and later."""
        self.experiment.rewind(row)


class MetricsWriter(ExperimentWriter):
    """Lightning's writer of CSV files, except that it keeps a file that is there, and never loses one to a kill."""

    @override
    def _check_log_dir_exists(self) -> None:
        """Keep what is there: only when training starts is it known from where."""

    def rewind(self, row: int) -> None:
        """Drop the rows of step ``row`` and later, and a last one that was written in part."""
        path = Path(self.metrics_file_path)
        columns, rows = read_rows(path) if path.is_file() else ([], [])
        kept = [values for values in rows if int(values["step"]) < row] if "step" in columns else []
        self.metrics, self.metrics_keys = [], columns if kept else []
        if kept:
            replace_csv(path, columns, kept)
        else:
            path.unlink(missing_ok=True)

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        replace_csv(path, fieldnames, read_rows(path)[1])


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows of a CSV file whose last line may have been cut off."""
    whole = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0]
    reader = csv.DictReader(whole.splitlines())
    columns = list(reader.fieldnames or [])
    return columns, [row for row in reader if None not in row and None not in row.values()]


def replace_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV file in place of another in one step."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


class MetricsEvents(TensorBoardLogger):
    """TensorBoard's event files in ``folder``, in which a resumed run hides what was logged after its checkpoint.

    Args:
        folder: where the files stand.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="")

    @rank_zero_only
    def rewind(self, row: int) -> None:
        """Begin a new file that tells TensorBoard to forget step ``row`` and later."""
        if self._experiment is not None:
            self._experiment.close()
        self._experiment = None
        self._kwargs["purge_step"] = row
