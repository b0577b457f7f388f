"""Which checkpoint is the best one by a metric, and the record of it beside the checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid.callbacks.links import link
from lightning_hybrid.checkpoint import newest_complete
from lightning_hybrid.config.sweep import larger_is_better
from lightning_hybrid.errors import CheckpointError, ConfigError

Mode = Literal["max", "min"]
RECORD, LINK = "best.json", "best.ckpt"


@dataclass(frozen=True)
class Best:
    """What ``best.json`` says.

    Attributes:
        checkpoint: name of its folder, beside the record.
        metric: that it is best by.
        mode: whether the largest or the smallest value is the best.
        value: of the metric, with the weights of the checkpoint.
        step: at which it was written.
    """

    checkpoint: str
    metric: str
    mode: Mode
    value: float
    step: int


def read_best(folder: str | Path) -> Best | None:
    """The record in a folder of checkpoints; None where there is none.

    Raises:
        CheckpointError: if it cannot be read.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    try:
        best = Best(**json.loads(path.read_text(encoding="utf-8")))
        if Path(best.checkpoint).name != best.checkpoint or best.checkpoint in ("", ".", ".."):
            raise ValueError(f"{best.checkpoint!r} is no folder beside it")  # what it names is removed one day
        return best
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"'{path}' is no record of the best checkpoint: {error}; remove it") from error


def best_checkpoint(folder: str | Path) -> Path:
    """The best checkpoint of a run, by its record.

    Raises:
        CheckpointError: if there is none, or it is not there any more.
    """
    best = read_best(folder)
    if best is None:
        raise CheckpointError(
            f"no best checkpoint in '{folder}': the run needs callbacks.best_metric, such as val/score, and a "
            "validation that has logged it"
        )
    path = Path(folder) / best.checkpoint
    if not path.is_dir():
        newest = newest_complete(folder)
        offer = "there is no other" if newest is None else f"the newest complete one is '{newest}'"
        raise CheckpointError(f"the best checkpoint '{path}', by {best.metric}={best.value:g}, is gone; {offer}")
    return path


class BestByMetric:
    """Judge checkpoints by a metric: of validation after each validation, of training where a checkpoint is due.

    Values that are not finite are never the best, and of equal ones the earlier is.

    Args:
        metric: name under which it is logged.
        mode: whether the largest or the smallest value is the best; None: the smallest of a loss, else the largest.

    Attributes:
        best: so far; None while there is none.
    """

    def __init__(self, metric: str, mode: Mode | None = None) -> None:
        self.metric = metric
        self.mode: Mode = mode or ("max" if larger_is_better(metric) else "min")
        self.best: Best | None = None
        self._folder = Path()
        self._value: float | None = None
        self._found = self._of_validation = False

    def begin(self, trainer: L.Trainer, folder: Path, *, resumed: bool) -> None:
        """Go on with the record of the run that is resumed, as far as it was then; otherwise begin anew.

        Raises:
            ConfigError: if the metric is one of validation, and there will be none.
        """
        if self.metric.startswith("val/") and not _validates(trainer):
            raise ConfigError(
                f"callbacks.best_metric = {self.metric!r} is logged by validation, and there is none: set "
                "data.validation_path or data.validation_fraction, and leave trainer.limit_val_batches above 0"
            )
        self._folder, self._value, self._found, self._of_validation = folder, None, False, False
        self.best = trainer.strategy.broadcast(self._record(trainer, resumed=resumed))

    @property
    def waiting(self) -> bool:
        """Whether the weights as they are now are the best, and not kept yet."""
        value, best = self._value, self.best
        if value is None or best is None:
            return value is not None
        return value > best.value if self.mode == "max" else value < best.value

    def holds(self, path: str | Path) -> bool:
        """Whether this checkpoint is the best one."""
        return self.best is not None and Path(path).name == self.best.checkpoint

    def validated(self, trainer: L.Trainer) -> None:
        """Judge the weights by what the validation that has just ended logged.

        Raises:
            ConfigError: if the metric has not been logged, naming those that have.
        """
        logged = trainer._logger_connector.metrics["callback"]
        if self.metric in logged:
            self._of_validation = True
            self._take(trainer, logged)
        elif self.metric not in trainer.callback_metrics:
            raise self._never_logged(trainer)

    def due(self, trainer: L.Trainer) -> None:
        """Judge the weights, of which a checkpoint is due, by a metric of training.

        Raises:
            ConfigError: if the metric has not been logged, and no validation will, naming those that have.
        """
        if self._of_validation:
            return
        if self.metric in trainer.callback_metrics:
            self._take(trainer, trainer.callback_metrics)
        elif not _validates(trainer):
            raise self._never_logged(trainer)

    def keep(self, trainer: L.Trainer, path: Path, newest: Collection[str]) -> None:
        """Record a checkpoint of these weights as the best one, and remove the one that was.

        Args:
            trainer: of the run.
            path: of the checkpoint.
            newest: names of those that are kept anyway.
        """
        former = self.best
        assert self._value is not None
        self.best = best = Best(path.name, self.metric, self.mode, self._value, trainer.global_step)
        self._value = None
        if trainer.is_global_zero:
            # Not one that a thread is still writing.
            when_complete: Any = getattr(trainer.strategy, "when_checkpoint_complete", lambda act: act())
            when_complete(lambda: _write(self._folder, best))
        if former is not None and former.checkpoint not in {*newest, path.name}:
            trainer.strategy.remove_checkpoint(self._folder / former.checkpoint)

    def end(self, trainer: L.Trainer) -> None:
        """Say so where the metric was never logged, nor is there a best checkpoint of before."""
        if not self._found and self.best is None:
            rank_zero_warn(f"no checkpoint is the best: {self._never_logged(trainer)}")

    def _take(self, trainer: L.Trainer, logged: Mapping[str, Any]) -> None:
        value = float(trainer.strategy.broadcast(float(logged[self.metric])))
        self._found = True
        self._value = value if math.isfinite(value) else None
        if self._value is None:
            rank_zero_warn(
                f"{self.metric} is {value} after step {trainer.global_step}: such a checkpoint is never the best"
            )

    def _record(self, trainer: L.Trainer, *, resumed: bool) -> Best | None:
        """On rank 0: the record of the best checkpoint until now; one of another metric, or of later, is removed."""
        if not trainer.is_global_zero:
            return None
        best = read_best(self._folder) if resumed else None
        usable = (
            best is not None
            and (best.metric, best.mode) == (self.metric, self.mode)
            and best.step <= trainer.global_step
            and (self._folder / best.checkpoint).is_dir()
        )
        if not usable:
            (self._folder / RECORD).unlink(missing_ok=True)
            if (self._folder / LINK).is_symlink():
                (self._folder / LINK).unlink()
        return best if usable else None

    def _never_logged(self, trainer: L.Trainer) -> ConfigError:
        names, step = ", ".join(sorted(trainer.callback_metrics)) or "nothing", trainer.global_step
        return ConfigError(
            f"callbacks.best_metric = {self.metric!r} was not logged until step {step}; logged are: {names}"
        )


def _validates(trainer: L.Trainer) -> bool:
    # Loaders are there before training begins, unless the first validation is epochs away.
    empty = trainer.val_dataloaders is not None and not any(trainer.num_val_batches)
    return bool(trainer.enable_validation) and not empty


def _write(folder: Path, best: Best) -> None:
    new = folder / f"{RECORD}.new"
    new.write_text(json.dumps(asdict(best), indent=1) + "\n", encoding="utf-8")
    os.replace(new, folder / RECORD)
    link(folder, folder / best.checkpoint, "best")
