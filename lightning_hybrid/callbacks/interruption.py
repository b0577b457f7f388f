"""Stop where nothing is lost: at the end of a phase, with a checkpoint."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from typing_extensions import override

from lightning_hybrid.callbacks.checkpoints import Checkpoints
from lightning_hybrid.callbacks.requeue import requeue
from lightning_hybrid.callbacks.signals import SignalWatch, say
from lightning_hybrid.checkpoint import newest_complete

INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


class Interrupted(SystemExit):
    """Training stopped because a signal asked for it; the process ends with its code, and runs nothing further."""


class StopOnSignal(L.Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C: finish the phase, write a checkpoint, and end.

    A phase is one of the module's ``phases``, as :class:`~lightning_hybrid.modules.PPOModule` has them; other modules
    finish the batch, and its validation. Ranks agree at the end of each phase, so that a signal to one of them stops
    all. SIGTERM and SIGUSR1 end the process with code 0, Ctrl-C with 130; in a notebook or an interactive interpreter a
    ``KeyboardInterrupt`` is raised. A second SIGTERM or Ctrl-C stops at once.

    Under SLURM the requeue signal (SIGUSR1 by default) also has the job requeued, where Lightning's
    ``SLURMEnvironment`` has ``auto_requeue``; SIGTERM, which ``scancel`` sends too, has not.

    An error that all ranks raise together leaves a checkpoint as well; after any other, the newest one is named.

    Lightning's own handlers of these signals stand aside during training. Outside the main thread Python handles no
    signals; it is said once.

    Args:
        folder: where checkpoints are written, unless the Trainer has :class:`Checkpoints`; None writes none.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._watch: SignalWatch | None = None
        self._training = False
        self._doing = "the batch"
        self._listener: Callable[[str], None] | None = None

    # ---- while training ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remember the handlers that are there before Lightning installs its own."""
        if stage == "fit":
            self._watch = SignalWatch(_signals(trainer), self._intention, lambda: _end_launched(trainer), _interrupt)
            self._watch.remember()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch for signals, and listen to the phases."""
        self._training, self._doing = True, "the batch"
        if self._watch is not None and not self._watch.install() and trainer.is_global_zero:
            say("signals are not handled: fit runs outside the main thread")
        phases: Any = getattr(pl_module, "phases", None)
        if phases is not None:
            self._listener = lambda phase: self._begin_phase(trainer, phase)
            phases.listeners.append(self._listener)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if asked to, between two optimizer steps."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """The last phase is over."""
        self._doing = "the batch"

    @override
    def on_validation_start(self, *_: Any) -> None:
        """A validation is finished: half of one cannot be gone on with."""
        self._doing = "the validation"

    @override
    def on_validation_end(self, *_: Any) -> None:
        """What comes next is a batch."""
        self._doing = "the batch"

    @override
    def on_train_end(self, *_: Any) -> None:
        """What comes next is written whole: the last checkpoint, the exported model."""
        self._doing = "the end of training"

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the handlers back; a signal that came during the end of training lets nothing follow it."""
        asked = self._asked(trainer)
        self._leave(pl_module)
        if asked:
            if trainer.is_global_zero:
                say("stopped: training was at its end")
            raise Interrupted(_exit_code(trainer, asked))

    def _intention(self) -> str:
        kept = self.folder is not None or self._doing == "the end of training"
        return f"finishing {self._doing}, then {'writing a checkpoint' if kept else 'stopping without a checkpoint'}"

    def _begin_phase(self, trainer: L.Trainer, phase: str) -> None:
        self._stop_if_asked(trainer)
        self._doing = f"the phase '{phase}'"

    # ---- stopping ----------------------------------------------------------------------------------------------------

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = self._asked(trainer)
        if not asked:
            return
        self._keep(trainer)
        if _requeues(trainer) and _requeue_signal(trainer) in asked and signal.SIGINT not in asked:
            # Only when every rank has written its part.
            trainer.strategy.barrier("requeue")
            if trainer.is_global_zero:
                say(requeue())
        raise Interrupted(_exit_code(trainer, asked))

    def _asked(self, trainer: L.Trainer) -> set[signal.Signals]:
        """Signals that arrived at any rank: every rank must ask at the same place."""
        if self._watch is None:
            return set()
        watched, received = self._watch.signals, self._watch.received
        if trainer.world_size == 1:
            return set(received)
        flags = torch.tensor([number in received for number in watched], dtype=torch.int32)
        flags = trainer.strategy.reduce(flags.to(trainer.strategy.root_device), reduce_op="max")
        return {number for number, flag in zip(watched, flags.tolist(), strict=True) if flag}

    def _keep(self, trainer: L.Trainer) -> None:
        """Write a checkpoint, on every rank, and say where it is."""
        if self.folder is None:
            return
        callback = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), None)
        if callback is None:
            path = self.folder / f"step={trainer.global_step:06d}.ckpt"
            trainer.save_checkpoint(path)
        else:
            path = callback.save(trainer)
        # One that a thread writes is awaited: after this line the process may be gone.
        finish: Any = getattr(trainer.strategy, "finish_checkpoints", None)
        if finish is not None:
            finish()
        if trainer.is_global_zero:
            say(f"checkpoint: {path}\nto go on from it, give the same command again with ckpt_path=last")

    # ---- errors ------------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the handlers back, and see to it that what can be kept is kept."""
        training = self._training
        self._leave(pl_module)
        if isinstance(exception, Interrupted):
            if _is_interactive():
                _shut_down(trainer)
                raise KeyboardInterrupt from exception
        elif training and getattr(exception, "on_every_rank", False):
            self._keep_after(trainer, exception)
        elif training:
            self._name_newest()

    def _keep_after(self, trainer: L.Trainer, exception: BaseException) -> None:
        try:
            self._keep(trainer)
        except Exception as error:
            # The first error is the one to report; this one must not hide it.
            say(f"no checkpoint could be written after {type(exception).__name__}: {error}")
            self._name_newest()

    def _name_newest(self) -> None:
        """Other ranks may be in the middle of anything: nothing is written now."""
        newest = None if self.folder is None else newest_complete(self.folder)
        if newest is not None:
            say(f"the newest complete checkpoint is {newest}: ckpt_path=last goes on from it")

    def _leave(self, pl_module: L.LightningModule) -> None:
        self._training = False
        if self._watch is not None:
            self._watch.remove()
        self._watch = None
        if self._listener is not None:
            phases: Any = pl_module.phases
            phases.listeners.remove(self._listener)
            self._listener = None


def _requeues(trainer: L.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def _requeue_signal(trainer: L.Trainer) -> signal.Signals:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    configured = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
    return configured or signal.SIGUSR1


def _signals(trainer: L.Trainer) -> list[signal.Signals]:
    return [signal.SIGTERM, signal.SIGINT, _requeue_signal(trainer)]


def _exit_code(trainer: L.Trainer, asked: set[signal.Signals]) -> int:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    # Lightning kills the process that the user started when one that it launched ends with another code than 0.
    launched = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
    return INTERRUPTED if signal.SIGINT in asked and not launched else 0


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _interrupt() -> BaseException:
    return KeyboardInterrupt() if _is_interactive() else Interrupted(INTERRUPTED)


def _end_launched(trainer: L.Trainer) -> None:
    """End the ranks that Lightning launched, which have no terminal of their own to be stopped from."""
    launcher: Any = trainer.strategy.launcher
    if launcher is not None and hasattr(launcher, "kill"):
        launcher.kill(signal.SIGKILL)


def _shut_down(trainer: L.Trainer) -> None:
    """What Lightning does after an exception, except that it turns ``KeyboardInterrupt`` into the interpreter's end."""
    for logger in trainer.loggers:
        logger.finalize("failed")
    trainer._teardown()
