"""Runs beside each other: what was set differently, what came of it, and what they write; as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hybrid.errors import DataError
from lightning_hybrid.report.charts import number
from lightning_hybrid.report.panels import SECONDS, Panel, panels_for
from lightning_hybrid.report.runs import RecordedRun, Sample, read_run

_NOT_SETTINGS = ("output_dir", "root", "ckpt_path", "hydra")  # they say where a run is, not what it is
_MISSING = "not set"
_PROMPTS = 12


@dataclass(frozen=True)
class RunComparison:
    """Runs beside each other; every row holds a name, then a text for each run.

    Attributes:
        runs: in the order in which they were named.
        labels: of each run, the end of its path that tells it from the others.
        settings: those that differ.
        metrics: last values, and the best of those of which one end is better.
        samples: prompts to which all runs have responses, with the last response of each.
    """

    runs: tuple[RecordedRun, ...]
    labels: tuple[str, ...]
    settings: list[list[str]]
    metrics: list[list[str]]
    samples: list[tuple[str, list[Sample]]]

    @property
    def recipe(self) -> str:
        """Of all runs, or "" where they are of several."""
        recipes = {run.recipe for run in self.runs}
        return recipes.pop() if len(recipes) == 1 else ""

    def __str__(self) -> str:
        unknown = ", ".join(self.without_config)
        none = {
            "settings that differ": f"not known: {unknown} kept none" if unknown else "none",
            "metrics": "none logged",
        }
        parts = [
            _text_table(title, ["", *self.labels], rows) if rows else f"{title}: {none[title]}"
            for title, rows in (("settings that differ", self.settings), ("metrics", self.metrics))
        ]
        shared = len(self.samples)
        parts.append(
            f"samples: {shared} prompts that all of them answered" if shared else "samples: no prompt in common"
        )
        return "\n\n".join(parts)

    @property
    def without_config(self) -> list[str]:
        """Labels of the runs whose settings are not known."""
        return [label for run, label in zip(self.runs, self.labels, strict=True) if run.config is None]


def compare_runs(folders: Sequence[str | Path]) -> RunComparison:
    """Read runs and lay them beside each other.

    Args:
        folders: of two runs or more.

    Raises:
        DataError: if there are fewer, one is named twice, or one is not the folder of a run.
    """
    resolved = [Path(folder).resolve() for folder in folders]
    if len(set(resolved)) < len(resolved) or len(resolved) < 2:
        named = ", ".join(map(str, folders)) or "none"
        raise DataError(f"compare needs the folders of two different runs or more, got {named}")
    runs = tuple(read_run(folder) for folder in folders)
    configs = [_flat(run.config) for run in runs if run.config is not None]
    return RunComparison(
        runs=runs,
        labels=labels_of(resolved),
        settings=_differences(configs) if len(configs) == len(runs) else [],
        metrics=_metrics(runs),
        samples=_shared_samples(runs),
    )


def labels_of(folders: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of the paths that differ from each other."""
    longest = max(len(folder.parts) for folder in folders)
    for depth in range(1, longest + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return tuple(names)


# ---- what differs ----------------------------------------------------------------------------------------------------


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if not prefix and key in _NOT_SETTINGS:
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _differences(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [[key, *(str(config.get(key, _MISSING)) for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _metrics(runs: Sequence[RecordedRun]) -> list[list[str]]:
    """The metrics of the recipes' panels that a run logged."""
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    rows = []
    for panel in shared_panels(runs, list(logged)):
        for name in panel.shows(logged):
            rows.append([f"{name}, last", *(_last(run, name) for run in runs)])
            if panel.better is not None:
                best = max if panel.better == "higher" else min
                rows.append(
                    [f"{name}, {'highest' if best is max else 'lowest'}", *(_best(run, name, best) for run in runs)]
                )
    steps = [["steps logged", *(f"{_steps(run):,}" for run in runs)]]
    return rows + steps if rows else []


def shared_panels(runs: Sequence[RecordedRun], logged: Sequence[str]) -> list[Panel]:
    """The panels of all the runs' recipes but the seconds, each metric once."""
    recipes = dict.fromkeys(run.recipe for run in runs)
    panels = {panel.train: panel for recipe in recipes for panel in panels_for(recipe, logged)}
    return [panel for panel in panels.values() if panel.train != SECONDS]


def _steps(run: RecordedRun) -> int:
    return 1 + max((steps[-1] for steps, _ in run.metrics.values() if steps), default=-1)


def _finite(run: RecordedRun, name: str) -> list[tuple[int, float]]:
    steps, values = run.metrics.get(name, ([], []))
    return [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]


def _last(run: RecordedRun, name: str) -> str:
    """The mean of the last tenth, as a single step says little."""
    values = [value for _, value in _finite(run, name)]
    end = values[-max(1, len(values) // 10) :]
    return number(math.fsum(end) / len(end)) if end else "–"


def _best(run: RecordedRun, name: str, best: Any) -> str:
    points = _finite(run, name)
    if not points:
        return "–"
    step, value = best(points, key=lambda point: point[1])
    return f"{number(value)} at step {step}"


def _shared_samples(runs: Sequence[RecordedRun]) -> list[tuple[str, list[Sample]]]:
    held_out = all(run.evaluation for run in runs)
    latest = [{sample.prompt: sample for sample in (run.evaluation if held_out else run.samples)} for run in runs]
    shared = [prompt for prompt in latest[0] if all(prompt in samples for samples in latest[1:])]
    return [(prompt, [samples[prompt] for samples in latest]) for prompt in shared[-_PROMPTS:]]


# ---- as text ---------------------------------------------------------------------------------------------------------


def _text_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cut = [[cell if len(cell) <= 48 else f"{cell[:47]}…" for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[column]) for row in cut) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cut]
    return "\n".join([title, *(f"  {line}" for line in lines)])
