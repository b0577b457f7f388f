"""The progress bar in the colours of the package `rich`."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from typing_extensions import override

from lightning_hybrid.callbacks.progress import listeners_of, shown_metrics, steps_of_run
from lightning_hybrid.callbacks.speed import TokenSpeed
from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class RichPhaseBar(ProgressBar):
    """What :class:`~lightning_hybrid.callbacks.PhaseProgressBar` shows, drawn by ``rich``.

    Args:
        stage: what the run is called, such as ``"1/3 sft"``.

    Raises:
        ConfigError: if rich is not installed, or in a notebook the widgets that it draws with are not.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        if importlib.util.find_spec("rich") is None:
            raise ConfigError('callbacks.progress=rich needs the package rich: pip install "lightning-hybrid[rich]"')
        if _in_notebook() and importlib.util.find_spec("ipywidgets") is None:
            raise ConfigError(
                "callbacks.progress=rich draws nothing in a notebook without ipywidgets: pip install ipywidgets, "
                "or use callbacks.progress=tqdm"
            )
        self.stage = stage
        self._enabled = True
        self._speed = TokenSpeed()
        self._drawn: Progress | None = None
        self._training: TaskID | None = None
        self._validation: TaskID | None = None

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Write above the bar, as it is."""
        if self._drawn is not None:
            self._drawn.console.print(*args, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            sys.stdout.write(" ".join(map(str, args)) + "\n")

    # ---- training ----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar where training begins, which after a resume is not at 0, and listen to the phases."""
        self._speed = TokenSpeed(trainer.world_size)
        if not self._enabled:
            return
        self._drawn = _progress()
        self._drawn.start()
        total, done = steps_of_run(trainer), trainer.global_step
        self._training = self._drawn.add_task(self.stage, total=total, completed=done, metrics="")
        listeners_of(pl_module).append(self._show_phase)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar to the current step; the last phase is over."""
        self._speed.add(pl_module, batch)
        if self._drawn is None or self._training is None:
            return
        shown = shown_metrics(self.get_metrics(trainer, pl_module), self._speed)
        text = " ".join(f"{name}={_short(value)}" for name, value in shown.items())
        self._drawn.update(self._training, completed=trainer.global_step, description=self.stage, metrics=text)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar as it is now."""
        self._close(pl_module)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it is now; Lightning does not tear callbacks down after an exception."""
        self._close(pl_module)

    # ---- validation --------------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show a second bar below."""
        if self._drawn is not None and not trainer.sanity_checking:
            batches = sum(trainer.num_val_batches)
            total = int(batches) if batches < float("inf") else None
            self._validation = self._drawn.add_task(f"{self.stage} · validation", total=total, metrics="")

    @override
    def on_validation_batch_end(self, *_: Any) -> None:
        """Move it."""
        if self._drawn is not None and self._validation is not None:
            self._drawn.advance(self._validation)

    @override
    def on_validation_end(self, *_: Any) -> None:
        """Take it away."""
        if self._drawn is not None and self._validation is not None:
            self._drawn.remove_task(self._validation)
        self._validation = None

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _show_phase(self, phase: str) -> None:
        if self._drawn is not None and self._training is not None:
            self._drawn.update(self._training, description=f"{self.stage} · {phase}")

    def _close(self, pl_module: L.LightningModule) -> None:
        listeners = listeners_of(pl_module)
        if self._show_phase in listeners:
            listeners.remove(self._show_phase)
        if self._drawn is not None:
            self._drawn.stop()
        self._drawn = self._training = self._validation = None


def _progress() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("left  {task.fields[metrics]}", markup=False),
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel, not one that has merely imported what kernels are made of."""
    kernels: Any = sys.modules.get("ipykernel.kernelapp")
    return kernels is not None and bool(kernels.IPKernelApp.initialized())
