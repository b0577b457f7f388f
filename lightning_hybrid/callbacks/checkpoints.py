"""Checkpoints that are written between batches, and a link to the last one that never dangles."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_hybrid.checkpoint import newest_complete


class Checkpoints(ModelCheckpoint):
    """Keep the newest checkpoints as ``step=000123.ckpt``, and ``last.ckpt`` as a link to the newest of all.

    A checkpoint is written when the next batch begins, or training ends: by then the metrics of the batch before are
    logged and its validation is done, so that a run that goes on from it repeats neither and lacks neither. Nothing is
    written at the end of a batch, an epoch or a validation.

    Args:
        folder: where to.
        every: training steps from one checkpoint to the next; None for one per epoch.
        keep: newest checkpoints to keep.
    """

    def __init__(self, folder: str | Path, every: int | None = None, keep: int = 2) -> None:
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

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the run goes on from need not be written again."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
        here = resumed is not None and resumed.parent == Path(str(self.dirpath)).resolve()
        self._last_checkpoint_saved = str(resumed) if here else ""

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint where the batch before made one due."""
        every = self._every_n_train_steps
        due = trainer.global_step % every == 0 if every else batch_idx == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self.save(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint of the run."""
        if not self._should_skip_saving_checkpoint(trainer):
            self.save(trainer)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing: the batch is not logged yet."""

    @override
    def on_train_epoch_end(self, *_: Any) -> None:
        """Nothing: the epoch is not logged yet."""

    @override
    def on_validation_end(self, *_: Any) -> None:
        """Nothing: the next batch is about to begin."""

    def save(self, trainer: L.Trainer) -> Path:
        """Write a checkpoint of the current step, unless there is one; on every rank.

        Returns:
            its folder.
        """
        if not self._last_checkpoint_saved or self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        return Path(self._last_checkpoint_saved)

    @override
    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        """Also the one that the run went on from: otherwise each interruption would leave one for good."""
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
            when_complete(lambda: _link(filepath, linkpath))
        trainer.strategy.barrier()


def _link(filepath: str, linkpath: str) -> None:
    try:
        replace_link(Path(linkpath), os.path.relpath(filepath, os.path.dirname(linkpath)))
    except OSError as error:
        rank_zero_warn(f"no link {linkpath} to the last checkpoint: {error}; 'ckpt_path=last' finds it without")


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
