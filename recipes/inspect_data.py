"""What a tokenizer makes of data, before anything is trained on it: counts, lengths, samples with their masks.

Out comes a picture of the lengths, ``<output_dir>/lengths.png``; everything else is printed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning_hybrid.config.inspect import InspectRun, with_kind
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.report.inspection import Inspection, inspect_run
from lightning_hybrid.report.inspection_text import render
from lightning_hybrid.report.lengths import draw_lengths


def inspect_data(run: InspectRun) -> Inspection:
    """Print what there is to see, draw the lengths, and return the figures."""
    inspection = inspect_run(with_kind(run))
    picture = draw_lengths(inspection.lengths, inspection.limit, Path(run.output_dir) / "lengths.png")
    color = _shows_colors() if run.color is None else run.color
    print(render(inspection, color=color, sample_tokens=run.sample_tokens))
    print(f"lengths: {picture}")
    return inspection


def _shows_colors() -> bool:
    """Whether what is printed goes to a terminal, or FORCE_COLOR says so (force-color.org); NO_COLOR says no."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


if __name__ == "__main__":
    recipe_main("inspect", InspectRun, inspect_data)
