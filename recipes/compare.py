"""Runs beside each other: settings that differ, last and best metrics, curves over each other, responses to one prompt.

``lightning-hybrid compare RUN RUN [RUN ...] [--output FOLDER]`` prints the tables and writes ``compare.html`` and
``compare.png``. A run is named by its folder, the ``output_dir`` of its command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_hybrid.errors import DataError
from lightning_hybrid.report.compare_page import write_comparison
from lightning_hybrid.report.comparing import RunComparison, compare_runs


def compare(arguments: Sequence[str]) -> RunComparison:
    """Print and write the comparison, and return it."""
    parser = argparse.ArgumentParser("lightning-hybrid compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", default="comparison", help="folder for compare.html and compare.png")
    options = parser.parse_args(arguments)
    comparison = compare_runs(options.runs)
    print(comparison)
    page, picture = write_comparison(comparison, options.output)
    print(f"\nreport: {page.resolve()}")
    if picture is not None:
        print(f"picture: {picture.resolve()}")
    return comparison


if __name__ == "__main__":
    try:
        compare(sys.argv[1:])
    except DataError as error:
        sys.exit(f"error: {error}")
