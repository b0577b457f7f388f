"""Scores of two policies, seen as distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_hybrid.errors import DataError
from lightning_hybrid.report.style import BLUE, VERMILLION, decorate, legend

_BINS = 30


def draw_comparison(scores_before: Sequence[float], scores_after: Sequence[float], path: str | Path) -> None:
    """Draw a PNG with the histograms of both policies' scores over the same bins, and their means.

    Args:
        scores_before: of the policy before training, one for each response.
        scores_after: of the policy after it.
        path: the PNG to write; its folder is made where it is missing.

    Raises:
        DataError: if one of the two has no finite score.
    """
    import numpy as np
    from matplotlib.figure import Figure

    before, after = _finite("before", scores_before), _finite("after", scores_after)
    edges = np.histogram_bin_edges(before + after, bins=_BINS).tolist()
    figure = Figure(figsize=(6.4, 3.2), dpi=140, layout="constrained", facecolor="white")
    ax = figure.subplots()
    decorate(ax, "Scores of the responses", "score", "share of responses")
    for name, scores, color in (("before", before, VERMILLION), ("after", after, BLUE)):
        mean = math.fsum(scores) / len(scores)
        label = f"{name}: mean {mean:.3f}, n={len(scores)}"
        share = [1 / len(scores)] * len(scores)
        ax.hist(scores, bins=edges, weights=share, color=color, alpha=0.45, label=label)
        ax.axvline(mean, ymax=0.85, color=color, linewidth=1.8, linestyle="--")
    ax.margins(y=0.3)  # room for the legend
    legend(ax, columns=2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _finite(name: str, scores: Sequence[float]) -> list[float]:
    finite = [float(score) for score in scores if math.isfinite(score)]
    if not finite:
        raise DataError(f"no finite score {name} training among {len(scores)}: there is nothing to compare")
    return finite
