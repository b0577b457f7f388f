"""One table and one picture of the runs below a folder: a sweep done in pieces, or one that was cut off.

``lightning-hybrid summary FOLDER [metric=...] [direction=maximize|minimize] [value=last|best]`` writes
``FOLDER/summary.csv`` and ``FOLDER/summary.png``; the keys are those of ``conf/sweep/default.yaml``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_hybrid.config import SweepConfig
from lightning_hybrid.errors import ConfigError, LightningHybridError
from lightning_hybrid.report.summary import Summary, write_summary

_USAGE = "usage: lightning-hybrid summary FOLDER [metric=...] [direction=maximize|minimize] [value=last|best]"


def summarize_sweep(folder: str, settings: list[str]) -> Summary:
    """Write the summary, print it and return it."""
    values = dict(setting.split("=", maxsplit=1) for setting in settings)
    ranking = SweepConfig(**values)  # type: ignore[arg-type]
    summary = write_summary(Path(folder), ranking)
    print(summary)
    if ranking.metric is not None and summary.metric is None:
        raise ConfigError(
            f"metric = {ranking.metric}: no run logged it; there are {', '.join(summary.figures) or 'none'}"
        )
    return summary


if __name__ == "__main__":
    if len(sys.argv) < 2 or "--help" in sys.argv or "=" in sys.argv[1] or not all("=" in text for text in sys.argv[2:]):
        print(_USAGE)
        sys.exit(0 if "--help" in sys.argv else 2)
    try:
        failed = summarize_sweep(sys.argv[1], sys.argv[2:]).failed
    except LightningHybridError as error:
        sys.exit(f"error: {error}")
    sys.exit(2 if failed else 0)
