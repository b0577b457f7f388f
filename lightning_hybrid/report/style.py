"""How the pictures look; the colours can be told apart with any colour vision."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito 2008, "Color Universal Design"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
CYCLE = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", VERMILLION, "#999999")

_INK = "#1f2933"
_FAINT = "#616e7c"


def decorate(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels, and as little else as possible."""
    ax.set_facecolor("white")
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=8)
    ax.set_xlabel(xlabel, fontsize=9, color=_FAINT)
    ax.set_ylabel(ylabel, fontsize=9, color=_FAINT)
    ax.tick_params(labelsize=9, colors=_FAINT, length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color("#cbd2d9")
    ax.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.02)


def legend(ax: Axes, columns: int = 1) -> None:
    """Name the lines or areas, where there is room."""
    ax.legend(fontsize=8.5, ncols=columns, framealpha=0.85, edgecolor="none", labelcolor=_INK, handlelength=1.2)
