"""The figures as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_hybrid.report.style import BLUE, decorate
from peers.rounds import Entry
from peers.steps import Steps
from peers.workload import Workload

_GREY = "#9aa5b1"
_COLUMNS = ("", "tokens/s", "native is", "seconds", "tokens", "peak memory", "extra weights", "to infer", "to train")
_ROOFLINE = "roofline"

FOOTNOTES = """\
tokens/s         sampled tokens up to and including the EOS, over the seconds of the whole rollout, prefill included
native is        times as fast as this one; tokens and seconds are medians too, so they need not divide exactly
peak memory      during the first full rollout, over the resting training state (on a CPU: resident set)
extra weights    bytes of weights held beside those that train
to infer/train   seconds of the switch; what the first call after it has to prepare belongs to it
TRL GRPO rollout from the start of a GRPO step to its reward function; half of the prompts, two responses each
vLLM             keeps its cache from the start: it counts as peak memory"""
RANDOM_WEIGHTS = """\
random weights   many ids end a response, the same for everybody, so that lengths have a long tail: mean near a quarter
                 of the maximum, one in fifty at the maximum"""


@dataclass(frozen=True)
class Panel:
    """Bars to draw: what is compared, in which unit, and for each who and how much."""

    title: str
    unit: str
    bars: tuple[tuple[str, float], ...]


def print_rollouts(entries: Sequence[Entry], workload: Workload, bandwidth: float | None) -> None:
    """Print one line for each peer, measured or not.

    Args:
        entries: the first is ours.
        workload: that they ran.
        bandwidth: bytes per second for the share of the roofline; None leaves the column out.
    """
    header = _COLUMNS if bandwidth is None else (*_COLUMNS, _ROOFLINE)
    lines = [_figures(entry, entries[0], workload, bandwidth) for entry in entries if entry.note is None]
    print_table([header, *lines])
    for entry in entries:
        if entry.note is not None:
            print(f"{entry.name}: {entry.note}")


def _figures(entry: Entry, first: Entry, workload: Workload, bandwidth: float | None) -> tuple[str, ...]:
    assert entry.peer is not None
    figures = (
        entry.name,
        f"{entry.tokens_per_second:,.0f}",
        f"{entry.slower_than(first):.2f} ×" if first.rounds else "–",
        f"{entry.median(lambda r: r.sample.seconds):.2f}",
        f"{entry.median(lambda r: r.sample.tokens):,.0f}",
        size(entry.peak),
        size(entry.peer.extra_weight_bytes),
        f"{entry.median(lambda r: r.to_inference):.4f}",
        f"{entry.median(lambda r: r.to_training):.4f}",
    )
    return figures if bandwidth is None else (*figures, f"{entry.roofline_share(workload, bandwidth):.0%}")


def print_steps(taken: Sequence[Steps]) -> None:
    """Print one line for each that took steps; the first is ours."""
    rows = [("", "s/step", f"{taken[0].name} is", "of it rollout", "tokens", "tokens/s")]
    for steps in taken:
        tokens = steps.median(lambda step: step.tokens)
        figures = (
            f"{steps.seconds:.3f}",
            f"{steps.slower_than(taken[0]):.2f} ×",
            f"{steps.median(lambda step: step.rollout):.3f}",
            f"{tokens:,.0f}",
            f"{tokens / steps.seconds:,.0f}",
        )
        rows.append((steps.name, *figures))
    print_table(rows)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]))


def size(count: int | None) -> str:
    """Bytes for a table."""
    if count is None:
        return "–"
    if count == 0:
        return "0"
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def rollout_panel(entries: Iterable[Entry], title: str) -> Panel:
    """Tokens per second of those that were measured."""
    return Panel(title, "tokens/s", tuple((e.name, e.tokens_per_second) for e in entries if e.note is None))


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw one PNG with a panel of horizontal bars for each comparison, ours in colour.

    Args:
        panels: the first bar of each is ours.
        path: the PNG to write; its folder is made where it is missing.
    """
    from matplotlib.figure import Figure

    heights = [1.0 + 0.36 * len(panel.bars) for panel in panels]
    figure = Figure(figsize=(7.2, sum(heights)), dpi=140, layout="constrained", facecolor="white")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        names, values = zip(*reversed(panel.bars), strict=True)
        decorate(ax, panel.title, panel.unit, "")
        ax.grid(visible=False)
        bars = ax.barh(names, values, color=[_GREY] * (len(names) - 1) + [BLUE], height=0.62)
        ax.bar_label(
            bars, [f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in values], padding=4, fontsize=9
        )
        ax.margins(x=0.14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
