"""Learning curves of all stages as one picture of small panels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hybrid.errors import DataError
from lightning_hybrid.report.metrics import Metrics
from lightning_hybrid.report.panels import SECONDS, STAGES, Panel, phases_of
from lightning_hybrid.report.style import BLUE, CYCLE, VERMILLION, decorate, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_SMOOTH_FROM = 50  # points; fewer can be seen one by one
_MARK_UP_TO = 20  # points; a line of one point would not be seen at all


def draw_curves(metrics_by_stage: Mapping[str, Metrics], path: str | Path) -> None:
    """Draw one PNG with a panel for each known metric that was logged; metrics that were not are left out.

    Validation is drawn over training. Lines of more than 50 points get a moving average, with the raw line behind it.

    Args:
        metrics_by_stage: by stage, one of :data:`~lightning_hybrid.report.panels.STAGES`.
        path: the PNG to write; its folder is made where it is missing.

    Raises:
        DataError: if a stage is unknown, or there is nothing to draw.
    """
    from matplotlib.figure import Figure  # not pyplot, whose state belongs to the user

    panels = choose_panels(metrics_by_stage)
    if not panels:
        logged = {stage: sorted(metrics) for stage, metrics in metrics_by_stage.items()}
        raise DataError(f"no curve to draw in {path}: none of the known metrics was logged, only {logged}")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), dpi=140, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax, (stage, panel) in zip(axes, panels, strict=False):
        _draw_panel(ax, stage, panel, metrics_by_stage[stage])
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def choose_panels(metrics_by_stage: Mapping[str, Metrics]) -> list[tuple[str, Panel]]:
    """Stage and panel of all that can be drawn, in the order of the stages.

    Raises:
        DataError: if a stage is unknown.
    """
    unknown = [stage for stage in metrics_by_stage if stage not in STAGES]
    if unknown:
        raise DataError(f"unknown stages {unknown}: there are curves for {list(STAGES)}")
    return [
        (stage, panel)
        for stage, (_, _, panels) in STAGES.items()
        for panel in panels
        if stage in metrics_by_stage and panel.shows(metrics_by_stage[stage])
    ]


def _draw_panel(ax: Axes, stage: str, panel: Panel, metrics: Metrics) -> None:
    from matplotlib.ticker import MaxNLocator

    name, counted, _ = STAGES[stage]
    decorate(ax, f"{name} · {panel.title}", counted, panel.unit)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.train == SECONDS:
        _stack_seconds(ax, metrics)
        return
    if panel.train in metrics:
        _draw_line(ax, *metrics[panel.train], color=BLUE, label="training")
    if panel.validation in metrics:
        _draw_line(ax, *metrics[panel.validation], color=VERMILLION, label="validation")
        legend(ax)


def _draw_line(ax: Axes, steps: list[int], values: list[float], color: str, label: str) -> None:
    line: dict[str, Any] = {"color": color, "label": label, "linewidth": 1.8, "solid_capstyle": "round"}
    if len(steps) <= _MARK_UP_TO:
        line |= {"marker": "o", "markersize": 4}
    if len(steps) <= _SMOOTH_FROM:
        ax.plot(steps, values, **line)
        return
    ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    ax.plot(steps, smooth(values), **line)


def smooth(values: list[float]) -> list[float]:
    """Centred moving average over a twentieth of the points; at the ends, and around NaN, over those there are."""
    import numpy as np

    window = np.ones(2 * (len(values) // 40) + 1)
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    total = np.convolve(np.where(finite, array, 0.0), window, mode="same")
    count = np.convolve(finite.astype(np.float64), window, mode="same")
    means: list[float] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5).tolist()
    return means


def _stack_seconds(ax: Axes, metrics: Metrics) -> None:
    """Areas, one for each phase, that add up to the seconds of an iteration."""
    names = phases_of(metrics)
    seconds = {name: dict(zip(*metrics[f"{SECONDS}{name}"], strict=True)) for name in names}
    steps = sorted({step for by_step in seconds.values() for step in by_step})
    heights = [[seconds[name].get(step, 0.0) for step in steps] for name in names]
    if len(steps) == 1:  # an area needs two ends
        steps, heights = [steps[0], steps[0] + 1], [[height, height] for (height,) in heights]
    colors = [CYCLE[index % len(CYCLE)] for index in range(len(names))]
    ax.stackplot(steps, heights, labels=names, colors=colors, alpha=0.85, linewidth=0)
    tallest = max(map(sum, zip(*heights, strict=True)))
    ax.set_ylim(0, 1.5 * tallest or 1.0)  # room for the legend
    legend(ax, columns=2)
