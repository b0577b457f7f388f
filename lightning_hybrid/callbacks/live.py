"""Curves that grow below a notebook's cell while it trains."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import lightning as L
from typing_extensions import override

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.strategy.rank_main import in_notebook

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[list[int], list[float]]
"""Steps and values."""

COLUMNS = 3
MARK_UP_TO = 20  # points; a line of one point would not be seen at all
LINE, INK, FAINT, GRID = "#0072B2", "#1f2933", "#616e7c", "#e4e7eb"


class LiveCurves(L.Callback):
    """Redraw one small picture of some metrics in place; outside a notebook, print a line of them instead.

    It needs no widgets. With several devices rank 0 draws, and the picture appears in the notebook all the same.

    Args:
        metrics: what to show, by the names they are logged under, each in a panel; by default what PPO's users look
            at first. A metric that is not logged has no panel.
        every: steps between two points.
        seconds: at least as long between two pictures.

    Attributes:
        curves: of all points so far, by metric. The ranks of a notebook have their own.

    Raises:
        ConfigError: if nothing is to be shown, or ``every`` is below 1.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("reward/score", "policy/kl", "rollout/response_length"),
        every: int = 1,
        seconds: float = 1.0,
    ) -> None:
        if not metrics or isinstance(metrics, str) or every < 1:
            raise ConfigError(f"LiveCurves needs names of metrics and every >= 1, got {metrics!r} and every={every}")
        self.metrics, self.every, self.seconds = tuple(metrics), every, seconds
        self.curves: dict[str, Curve] = {}
        self._display = ""
        self._begun = self._shown_at = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new picture."""
        self.curves, self._display = {}, uuid4().hex
        self._begun, self._shown_at = time.monotonic(), -math.inf
        self._last = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a point where one is due, and show it unless the last picture is new."""
        if not trainer.is_global_zero or trainer.global_step < self._last + self.every:
            return
        self._last = trainer.global_step
        self._take(trainer)
        if time.monotonic() - self._shown_at >= self.seconds:
            self._show(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last points."""
        if trainer.is_global_zero and self.curves:
            self._show(trainer)

    def _take(self, trainer: L.Trainer) -> None:
        for name in self.metrics:
            if name in trainer.callback_metrics:
                steps, values = self.curves.setdefault(name, ([], []))
                steps.append(trainer.global_step)
                values.append(float(trainer.callback_metrics[name]))

    def _show(self, trainer: L.Trainer) -> None:
        first, self._shown_at = self._shown_at == -math.inf, time.monotonic()
        total = trainer.estimated_stepping_batches
        of = f" of {total:.0f}" if 0 < total < math.inf else ""
        title = f"step {trainer.global_step}{of}, {self._shown_at - self._begun:.0f} s"
        in_notebook(show, self._display, first, title, self.curves)


def show(display: str, first: bool, title: str, curves: Mapping[str, Curve]) -> None:
    """Show curves where the user is: a picture in a notebook, a line of text elsewhere.

    Args:
        display: names the picture, which is replaced by the next one of that name.
        first: whether there is none yet.
        title: above the picture.
        curves: by metric.
    """
    line = "  ".join([title, *(f"{name}={values[-1]:.4g}" for name, (_, values) in curves.items())])
    if not _in_kernel():
        print(line, flush=True)  # noqa: T201
        return
    from IPython.display import display as show_data

    # Those who read the notebook without pictures get the line.
    data = {"image/png": draw(title, curves), "text/plain": line}
    show_data(data, raw=True, display_id=display, update=not first)  # type: ignore[no-untyped-call]


def draw(title: str, curves: Mapping[str, Curve]) -> bytes:
    """A small PNG with a panel for each metric."""
    from matplotlib.figure import Figure  # not pyplot, whose state belongs to the user

    columns = min(COLUMNS, max(1, len(curves)))
    rows = max(1, math.ceil(len(curves) / columns))
    figure = Figure(figsize=(3.1 * columns, 2.2 * rows + 0.3), dpi=80, facecolor="white")
    figure.set_layout_engine("constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=FAINT)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax, (name, curve) in zip(axes, curves.items(), strict=False):
        _draw_curve(ax, name, curve)
    for ax in axes[len(curves) :]:
        ax.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_curve(ax: Axes, name: str, curve: Curve) -> None:
    from matplotlib.ticker import MaxNLocator

    marker = "o" if len(curve[0]) <= MARK_UP_TO else None
    ax.plot(*curve, color=LINE, linewidth=1.6, marker=marker, markersize=3)
    ax.set_title(name, loc="left", fontsize=9, fontweight="bold", color=INK)
    ax.tick_params(labelsize=8, colors=FAINT, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _in_kernel() -> bool:
    """Whether this process is a Jupyter kernel; IPython in a terminal shows no pictures."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
