"""Checkpoints that are written between batches: the newest, the best, and links to them that never dangle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_hybrid.callbacks.best import BestByMetric, Mode
from lightning_hybrid.callbacks.links import link
from lightning_hybrid.checkpoint import newest_complete

LAST = "last"


class Checkpoints(ModelCheckpoint):
    """Keep the newest checkpoints as ``step=000123.ckpt``, and ``last.ckpt`` as a link to the newest of all.

    With ``best_metric``, a checkpoint is also written after each validation that finds a better value of it than all
    before; ``best.ckpt`` is a link to it, ``best.json`` holds the value, and it stays, however old, until there is a
    better one. A metric of training is judged where a checkpoint is due.

    A checkpoint is written when the next batch begins, or training ends: by then the metrics of the batch before are
    logged and its validation is done, so that a run that goes on from it repeats neither and lacks neither. Nothing is
    written at the end of a batch, an epoch or a validation.

    Args:
        folder: where to.
        every: training steps from one checkpoint to the next; None for one per epoch.
        keep: newest checkpoints to keep.
        best_metric: keep the checkpoint with the best value of this metric, too; None for the newest only.
        best_mode: whether its largest or smallest value is the best; None: the smallest of a loss, else the largest.

    Raises:
        ConfigError: in training, if ``best_metric`` is not logged.
    """

    def __init__(
        self,
        folder: str | Path,
        every: int | None = None,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: Mode | None = None,
    ) -> None:
        super().__init__(
            dirpath=folder,
            filename="step={step:06d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            save_last="link",
            every_n_train_steps=every,
            every_n_epochs=1 if every is None else None,
            enable_version_counter=False,
        )
        self.by_metric = None if best_metric is None else BestByMetric(best_metric, best_mode)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the run goes on from need not be written again."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
        here = resumed is not None and resumed.parent == Path(str(self.dirpath)).resolve()
        self._last_checkpoint_saved = str(resumed) if here else ""
        if self.by_metric is not None:
            self.by_metric.begin(trainer, Path(str(self.dirpath)), resumed=here)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint where the batch before made one due, or was found to be the best."""
        every = self._every_n_train_steps
        due = trainer.global_step % every == 0 if every else batch_idx == 0
        self._save_if(due, trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint of the run."""
        self._save_if(True, trainer)
        if self.by_metric is not None:
            self.by_metric.end(trainer)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing: the batch is not logged yet."""

    @override
    def on_train_epoch_end(self, *_: Any) -> None:
        """Nothing: the epoch is not logged yet."""

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge what the validation found; written it is when the next batch begins."""
        if self.by_metric is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.by_metric.validated(trainer)

    def _save_if(self, due: bool, trainer: L.Trainer) -> None:
        new = due and not self._should_skip_saving_checkpoint(trainer)
        if new and self.by_metric is not None:
            self.by_metric.due(trainer)
        if new or (self.by_metric is not None and self.by_metric.waiting):
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> Path:
        """Write a checkpoint of the current step, unless there is one; on every rank.

        Returns:
            its folder.
        """
        if not self._last_checkpoint_saved or self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        saved = Path(self._last_checkpoint_saved)
        if self.by_metric is not None:
            self._keep_best(trainer, self.by_metric, saved)
        return saved

    def _keep_best(self, trainer: L.Trainer, by_metric: BestByMetric, saved: Path) -> None:
        if by_metric.waiting:
            by_metric.keep(trainer, saved, {Path(path).name for path in self.best_k_models})
        if by_metric.best is not None:  # where Lightning's ckpt_path="best" looks
            self.best_model_path = str(Path(str(self.dirpath)) / by_metric.best.checkpoint)
            self.best_model_score = torch.tensor(by_metric.best.value)

    @override
    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also the one that the run went on from: otherwise each interruption would leave one for good."""
        if self.by_metric is not None and self.by_metric.holds(previous):
            return False
        return previous != current and Path(str(self.dirpath)).resolve() in Path(previous).absolute().parents

    @override
    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """What ``ckpt_path="last"`` means to Lightning: the newest complete one, wherever the link points."""
        newest = newest_complete(str(self.dirpath))
        return set() if newest is None else {str(newest)}

    @staticmethod
    @override
    def _link_checkpoint(trainer: L.Trainer, filepath: str, linkpath: str) -> None:
        """Replace the link in one step: Lightning removes the old one first, and a kill in between would lose both."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            # Not to one that a thread is still writing.
            when_complete: Any = getattr(trainer.strategy, "when_checkpoint_complete", lambda act: act())
            when_complete(lambda: link(Path(linkpath).parent, filepath, LAST))
        trainer.strategy.barrier()
