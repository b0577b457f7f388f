"""Reading what Lightning's CSVLogger wrote."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from lightning_hybrid.errors import DataError

Metrics = dict[str, tuple[list[int], list[float]]]
"""Steps and values of each metric."""

_NOT_METRICS = ("step", "epoch")


def read_metrics(path: str | Path) -> Metrics:
    """Read a ``metrics.csv``, in which each row holds the metrics that were logged together and leaves the rest empty.

    A last row without its end is left out: the run still writes it, or was killed while it did.

    Args:
        path: a file that ``lightning.pytorch.loggers.CSVLogger`` wrote.

    Returns:
        For each metric the steps at which it was logged and its values, in the order of the file.

    Raises:
        DataError: if the file is missing, or is not such a file; names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no metrics at {path}: the run logged nothing yet, or logged elsewhere; use logger=csv")
    metrics: Metrics = {}
    whole, end, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    for step, name, value in _cells(path, csv.DictReader(io.StringIO(whole + end, newline=""))):
        steps, values = metrics.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
    return metrics


def _cells(path: Path, rows: csv.DictReader[str]) -> Iterator[tuple[int, str, float]]:
    """Step, metric and value of each cell that is not empty."""
    if "step" not in (rows.fieldnames or []):
        raise DataError(f"{path}:1: expected a header with a column 'step', got {rows.fieldnames}")
    for row in rows:
        try:
            step = int(row["step"])
            # A row longer than the header has its surplus under None, as a list, and fails here like any other text.
            filled = {name: float(cell) for name, cell in row.items() if cell and name not in _NOT_METRICS}
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}:{rows.line_num}: not a row of metrics: {error}") from error
        for name, value in filled.items():
            yield step, name, value
