"""Progress bars that say what is going on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from lightning_hybrid.callbacks.speed import TokenSpeed

Shown = dict[str, int | str | float | dict[str, float]]


class PhaseProgressBar(TQDMProgressBar):
    """One bar for the whole of training, in optimizer steps, named after the stage and the phase that is running.

    A module whose ``phases`` announce themselves, as :class:`~lightning_hybrid.modules.PPOModule`'s do, is shown as
    ``3/3 ppo · rollout``; any other module as the stage alone. The time left is that of the whole run, at its mean
    speed so far. Beside what was logged for the bar, such as the mean score as ``reward``, stand the tokens per second
    of :class:`~lightning_hybrid.callbacks.speed.TokenSpeed` as ``tok/s``.

    Args:
        stage: what the run is called, such as ``"1/3 sft"``.
        refresh_rate: batches between two updates of the bar; 0 shows none.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_noinv_fmt}{postfix}]"

    def __init__(self, stage: str, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.stage = stage
        self._speed = TokenSpeed()

    @property
    @override
    def train_description(self) -> str:
        return self.stage

    @property
    @override
    def validation_description(self) -> str:
        return f"{self.stage} · validation"

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar where training begins, which after a resume is not at 0, and listen to the phases."""
        super().on_train_start(trainer, pl_module)
        bar = self.train_progress_bar
        bar.reset(total=steps_of_run(trainer))
        bar.initial = bar.n = trainer.global_step
        self._speed = TokenSpeed(trainer.world_size)
        listeners_of(pl_module).append(self._show_phase)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Go on with the bar: it is the run's, not the epoch's."""

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar to the current step; the last phase is over."""
        bar = self.train_progress_bar
        bar.set_description(self.stage, refresh=False)
        self._speed.add(pl_module, batch)
        if self._should_update(trainer.global_step, int(bar.total or 0)):
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Shown:
        """What was logged with ``prog_bar=True``, and the speed."""
        return shown_metrics(super().get_metrics(trainer, pl_module), self._speed)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop listening; Lightning does not tear callbacks down after an exception."""
        self._stop_listening(pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._stop_listening(pl_module)

    def _show_phase(self, phase: str) -> None:
        self.train_progress_bar.set_description(f"{self.stage} · {phase}")

    def _stop_listening(self, pl_module: L.LightningModule) -> None:
        listeners = listeners_of(pl_module)
        if self._show_phase in listeners:
            listeners.remove(self._show_phase)


def steps_of_run(trainer: L.Trainer) -> int | None:
    """Optimizer steps until training ends; None where nobody knows."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None


def shown_metrics(logged: Shown, speed: TokenSpeed) -> Shown:
    """What a bar shows of what was logged for it: a score as the reward, no version number, and the speed."""
    shown: Shown = {"reward" if name == "score" else name: value for name, value in logged.items() if name != "v_num"}
    per_second = speed.per_second()
    return shown if per_second is None else shown | {"tok/s": round(per_second)}


def listeners_of(pl_module: L.LightningModule) -> list[Callable[[str], None]]:
    """Whoever is told about the module's phases; a list that nobody reads for a module without phases."""
    phases: Any = getattr(pl_module, "phases", None)
    return [] if phases is None else phases.listeners
