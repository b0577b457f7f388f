"""How long the texts of a data set are, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_hybrid.report.style import CYCLE, VERMILLION, decorate, legend

_BINS = 40


def draw_lengths(lengths: Mapping[str, Sequence[int]], limit: int | None, path: str | Path) -> Path:
    """Draw a PNG with the histogram of each kind of length over the same bins, and the limit.

    Args:
        lengths: tokens, one for each row, by what is counted; none is empty.
        limit: most tokens of a row; None for no limit.
        path: the PNG to write; its folder is made where it is missing.

    Returns:
        The path.
    """
    import numpy as np
    from matplotlib.figure import Figure

    together = [length for counted in lengths.values() for length in counted]
    edges = np.histogram_bin_edges(together, bins=min(_BINS, max(together) - min(together) + 1)).tolist()
    figure = Figure(figsize=(6.4, 3.2), dpi=140, layout="constrained", facecolor="white")
    ax = figure.subplots()
    decorate(ax, "Length of the rows", "tokens", "rows")
    for (name, counted), color in zip(lengths.items(), CYCLE, strict=False):
        label = f"{name}: median {np.median(counted):g}, longest {max(counted):,}"
        ax.hist(counted, bins=edges, color=color, alpha=0.5, label=label)
    if limit is not None:
        ax.axvline(limit, color=VERMILLION, linewidth=1.5, linestyle="--", label=f"limit {limit:,}")
    ax.margins(y=0.35)  # room for the legend
    legend(ax)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return Path(path)
