"""The curves of several runs over each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hybrid.report.curves import smooth
from lightning_hybrid.report.panels import STAGES, panels_for
from lightning_hybrid.report.style import CYCLE, decorate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_hybrid.report.summary import Summary, SweptRun

_PANELS = 6
_COLUMNS = 3
_SMOOTH_FROM = 50  # points
_MARK_UP_TO = 20  # points; a line of one point would not be seen at all
_REST = "#cbd2d9"


def draw_overlay(summary: Summary, path: Path) -> None:
    """Draw a PNG with a panel for each of the first metrics, the one that ranks first, and a line in it for each run.

    The best seven runs have a colour and a name; further ones are grey.
    """
    from matplotlib.figure import Figure  # not pyplot, whose state belongs to the user

    names = summary.figures[:_PANELS]
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.0), 3.0 * rows + 0.6), dpi=140, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax, name in zip(axes, names, strict=False):
        _draw_panel(ax, name, summary)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    _name_runs(figure, summary)
    figure.savefig(path, format="png")


def _draw_panel(ax: Axes, name: str, summary: Summary) -> None:
    from matplotlib.ticker import MaxNLocator

    title, unit = _title(name, summary)
    counted = STAGES[summary.recipe][1] if summary.recipe in STAGES else "step"
    decorate(ax, title, counted, unit)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for place, run in reversed([*enumerate(summary.runs)]):  # the best ones over the others
        if name in run.metrics:
            _draw_line(ax, run, name, place)


def _draw_line(ax: Axes, run: SweptRun, name: str, place: int) -> None:
    steps, values = run.metrics[name]
    marker = "o" if len(steps) <= _MARK_UP_TO else None
    shown = smooth(values) if len(values) > _SMOOTH_FROM else values
    width = 1.8 if place < len(CYCLE) else 0.8
    ax.plot(steps, shown, color=_color(place), linewidth=width, marker=marker, markersize=3.5)


def _title(name: str, summary: Summary) -> tuple[str, str]:
    """What a metric is called, and its unit."""
    for panel in panels_for(summary.recipe, [name]):
        return (panel.title if name == panel.train else f"{panel.title}, validation"), panel.unit
    return name, ""


def _name_runs(figure: Figure, summary: Summary) -> None:
    from matplotlib.lines import Line2D

    entries = [(_color(place), _name(run)) for place, run in enumerate(summary.runs[: len(CYCLE)])]
    hidden = len(summary.runs) - len(entries)
    if hidden:
        entries.append((_REST, f"{hidden} more"))
    lines = [Line2D([], [], color=color, linewidth=2.4) for color, _ in entries]
    longest = max(len(text) for _, text in entries)
    columns = max(1, min(len(entries), int(figure.get_figwidth() * 11) // (longest + 6)))
    figure.legend(
        lines, [text for _, text in entries], loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )


def _name(run: SweptRun) -> str:
    value = "" if run.value is None else f": {run.value:.4g}"
    return f"{run.label}{value}" + ("" if run.status in ("done", "alone") else f" ({run.status})")


def _color(place: int) -> str:
    return CYCLE[place] if place < len(CYCLE) else _REST
