"""Where a checkpoint says that a run stands, also when it is written in the middle of a step or of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid.checkpoint import Position, ResumableLoader, capture_streams, restore_streams
from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Progress:
    """The position in the data, at the last moment at which nothing was unfinished.

    Gradients that wait for their step, and a batch that is being worked on, are not in a checkpoint: it says that the
    run stands before them, and they are done again. So it is worth the same on any number of ranks.

    Args:
        trainer: of the run.

    Attributes:
        engines: those that train, by name; none before they are built, which is after the first loaders may be.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.engines: Mapping[str, DeepSpeedEngine] = {}
        self._steps: dict[str, int] = {}
        self._batches = 0
        self._resume: list[Position] = []
        self._streams: Position | None = None
        self._resumed = False

    # ---- data loaders ------------------------------------------------------------------------------------------------

    def resume_at(self, positions: list[Position]) -> None:
        """Let the training loaders, in their order, begin at positions: those that there are, and those to come."""
        self._resume = list(positions)
        for loader in self._loaders[: len(positions)]:
            loader.resume_at(self._resume.pop(0))
        self._streams = positions[0]
        self._resumed = True

    def begin_training(self) -> None:
        """Take up the random streams where a checkpoint was written between two epochs: what begins one may draw."""
        if self._streams is not None and self._streams.ended:
            self._take_up_streams()

    def begin_batch(self) -> None:
        """Take up the random streams where no loader did, which knows better when; called once a batch is ready."""
        if self._resumed:
            self._forget_batches_done_again()
        if self._streams is not None and not self._loaders:
            self._take_up_streams()

    def _forget_batches_done_again(self) -> None:
        """Lightning counts a batch that is done again after a resume twice as begun, in all that ever began.

        The next checkpoint would say that one more was begun than done, and a run that went on from it would stand one
        batch before its data.
        """
        self._resumed = False
        ever: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        ever.ready, ever.started, ever.processed = ever.completed + 1, ever.completed, ever.completed

    def _take_up_streams(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None and streams.now:
            restore_streams(streams.now)

    def resumable(self, loader: Any) -> Any:
        """A training loader that knows its position; as it is one that keeps its own state, or has no length."""
        if hasattr(loader, "state_dict") or not hasattr(loader, "batch_sampler") or sized_len(loader) is None:
            return loader
        if getattr(loader, "persistent_workers", False):
            rank_zero_warn(
                "persistent_workers=True: what workers draw at random goes on from one epoch to the next, and is not "
                "the same after a resume; what they do not draw is"
            )
        ahead = getattr(self.trainer.lightning_module, "looks_ahead", False)
        known = ResumableLoader(loader, self._at_boundary, look_ahead=ahead)
        if self._resume:
            known.resume_at(self._resume.pop(0))
        return known

    @property
    def _loaders(self) -> list[ResumableLoader]:
        return _resumable_loaders(self.trainer)

    def _at_boundary(self) -> bool:
        """Whether no engine holds gradients that wait for their step; asked before each batch."""
        if self._gradients_wait:
            return False
        self._steps = self._steps_taken
        self._batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return True

    @property
    def _gradients_wait(self) -> bool:
        """Under manual optimization only a module knows what gradients that it leaves are for: they are not kept."""
        module = self.trainer.lightning_module
        return module.automatic_optimization and any(
            engine._unmanaged_backward_count > 0 for engine in self.engines.values()
        )

    @property
    def _steps_taken(self) -> dict[str, int]:
        return {name: engine.global_steps for name, engine in self.engines.items()}

    # ---- what a checkpoint says -------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether neither a batch nor an accumulation is in the middle."""
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return batches.ready == batches.processed and not self._gradients_wait

    @property
    def repeats_steps(self) -> bool:
        """Whether optimizer steps were taken that a resumed run would take a second time."""
        return not self.finished and bool(self._steps) and self._steps != self._steps_taken

    def positions(self) -> list[Position]:
        """Of each training loader."""
        finished, ended = self.finished, self._epoch_ended
        if not self._loaders:
            return [Position(0, {}, capture_streams(), ended)]
        return [loader.position(finished=finished, ended=ended) for loader in self._loaders]

    @property
    def _epoch_ended(self) -> bool:
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return bool(batches.is_last_batch) or self.trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    def described(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Lightning's state of the run, with its loops where :meth:`positions` says that the data is."""
        if self.finished or not self._loaders:
            return dict(state)
        loops = copy.deepcopy(state["loops"])
        self._rewind(loops["fit_loop"], self._batches)
        return {**state, "loops": loops}

    def _rewind(self, fit_loop: dict[str, Any], batches: int) -> None:
        """Let the loops say that the batch after the first ``batches`` of the epoch was begun, and no more."""
        _say_done(fit_loop, batches, begun=1)
        # On a restart Lightning counts the batch that was begun as one that stepped, unless it accumulates.
        every, last = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        if (batches + 1) % every == 0 or batches + 1 >= last:
            fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def upcoming_batch(trainer: pl.Trainer) -> Any | None:
    """The training batch after the one that is being worked on, for a module that ``looks_ahead``.

    Args:
        trainer: in whose ``fit`` the module is.

    Returns:
        The batch as its loader made it, on this rank's device; None where the epoch has no further one.

    Raises:
        ConfigError: if the training loader is not one that can be looked ahead in.
    """
    loaders = _resumable_loaders(trainer)
    if len(loaders) != 1:
        raise ConfigError(
            f"looking one batch ahead needs one training loader that has a length and keeps no state of its own, such "
            f"as a DataLoader, and there are {len(loaders)} of these: give one, or do not look ahead"
        )
    batch = None if _last_of_epoch(trainer) else loaders[0].upcoming
    return None if batch is None else trainer.strategy.batch_to_device(batch)


def _last_of_epoch(trainer: pl.Trainer) -> bool:
    """Whether the batch that is being worked on is the epoch's last, also where not all of the loader are."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready >= trainer.num_training_batches


def _resumable_loaders(trainer: pl.Trainer) -> list[ResumableLoader]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else [x for x in combined.flattened if isinstance(x, ResumableLoader)]


def as_between_batches(fit_loop: dict[str, Any], batches_per_epoch: float) -> None:
    """Make a saved loop state say that the batches that are done are done, and nothing else has begun.

    Lightning counts a batch as ready before it is trained, and an epoch as done when training ends within it. Resumed
    from such a state, it would skip the last batch of an epoch, log one row too high, or begin an epoch anew.

    Args:
        fit_loop: the state of Lightning's fit loop, changed in place.
        batches_per_epoch: infinite where unknown.
    """
    current, epochs = fit_loop["epoch_loop.batch_progress"]["current"], fit_loop["epoch_progress"]
    whole = current["completed"] >= batches_per_epoch
    if whole:
        current["completed"] = 0
    _say_done(fit_loop, current["completed"], begun=0)
    for part in ("total", "current"):
        # `ready` counts the epoch that is running.
        _count(epochs[part], done=epochs[part]["ready"] - (not whole), begun=1)


def _say_done(fit_loop: dict[str, Any], batches: int, *, begun: int) -> None:
    """Let a saved loop state say that the first ``batches`` of the epoch are done, and ``begun`` more have begun."""
    progress = fit_loop["epoch_loop.batch_progress"]
    of_earlier_epochs = progress["total"]["completed"] - progress["current"]["completed"]
    _count(progress["total"], done=of_earlier_epochs + batches, begun=begun)
    _count(progress["current"], done=batches, begun=begun)
    progress["is_last_batch"] = False


def _count(progress: dict[str, int], *, done: int, begun: int) -> None:
    progress.update(ready=done + begun, started=done + begun, processed=done, completed=done)
