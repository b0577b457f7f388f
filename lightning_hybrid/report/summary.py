"""The runs of a sweep side by side: what differs between them, what they came to, and how they ended."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_hybrid.config.sweep import SweepConfig
from lightning_hybrid.errors import DataError
from lightning_hybrid.report.metrics import Metrics, read_metrics
from lightning_hybrid.report.panels import SECONDS, panels_for
from lightning_hybrid.report.runs import METRICS, read_json
from lightning_hybrid.settings import without_credentials

RECORD = "job.json"
_TABLE_METRICS = 3  # beside the one that ranks
_AVERAGE = SweepConfig()


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
        folder: of the run.
        settings: what it was started with, as on the command line.
        status: ``done``, ``failed``, ``unfinished`` (still going, or killed), ``alone`` for a run outside a sweep, or
            ``damaged`` where its files cannot be read.
        seconds: from its start to its end; None while there is none.
        error: why it failed, or what is damaged.
        metrics: what it logged.
        differs: of the settings those that not all runs have alike.
        label: these in short.
        value: the number that it is ranked by.
    """

    folder: Path
    recipe: str
    settings: dict[str, str]
    status: str
    seconds: float | None = None
    error: str | None = None
    metrics: Metrics = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    label: str = ""
    value: float | None = None

    @property
    def steps(self) -> int:
        """One more than the last step that was logged."""
        return max((steps[-1] for steps, _ in self.metrics.values() if steps), default=-1) + 1


@dataclass(frozen=True)
class Summary:
    """All runs of a sweep, the best one first; printed, it is a table.

    Attributes:
        folder: of the sweep.
        metric: what ranks the runs; None where no metric that could was logged.
        runs: with the best value first, and those without one last.
    """

    folder: Path
    metric: str | None
    runs: tuple[SweptRun, ...]

    @property
    def failed(self) -> list[SweptRun]:
        """The runs that ended with an error, or cannot be read."""
        return [run for run in self.runs if run.status in ("failed", "damaged")]

    @property
    def figures(self) -> list[str]:
        """Metrics of the runs that are worth a column, the one that ranks first."""
        logged = list(dict.fromkeys(name for run in self.runs for name in run.metrics))
        shown = [name for panel in panels_for(self.recipe, logged) for name in panel.shows(logged)[:1]]
        first = [] if self.metric is None else [self.metric]
        return first + [name for name in shown if name != self.metric and not name.startswith(SECONDS)]

    @property
    def recipe(self) -> str:
        """That of all runs; empty where they differ."""
        recipes = {run.recipe for run in self.runs}
        return recipes.pop() if len(recipes) == 1 else ""

    def __str__(self) -> str:
        names = self.figures[: _TABLE_METRICS + 1]
        keys = list(dict.fromkeys(key for run in self.runs for key in run.differs))
        rows = [["run", *(_short(key, keys) for key in keys), *names, "steps", "seconds", ""]]
        rows += [self._cells(run, keys, names) for run in self.runs]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*(line.rstrip() for line in lines), f"summary: {self.folder.resolve()}/summary.csv, .png"])

    def _cells(self, run: SweptRun, keys: Sequence[str], names: Sequence[str]) -> list[str]:
        end = run.status if run.error is None else f"{run.status}: {_clip(run.error)}"
        seconds = "" if run.seconds is None else f"{run.seconds:.1f}"
        settings = [_brief(run.differs.get(key, "")) for key in keys]
        figures = [_number(figure_of(run, name, self.metric)) for name in names]
        return [_place(run, self.folder), *settings, *figures, str(run.steps), seconds, end]


def write_summary(folder: Path, ranking: SweepConfig) -> Summary:
    """Write ``summary.csv`` and, where anything was logged, ``summary.png`` into a folder with runs in it.

    Args:
        folder: of a sweep, or of several, or of single runs: whatever lies below it, at any depth.
        ranking: what the runs are ranked by.

    Raises:
        DataError: if there is no run in it.
    """
    from lightning_hybrid.report.overlay import draw_overlay

    summary = summarize(folder, ranking)
    _write_table(summary, folder / "summary.csv")
    if summary.figures:
        draw_overlay(summary, folder / "summary.png")
    return summary


def summarize(folder: Path, ranking: SweepConfig) -> Summary:
    """Read all runs below a folder and rank them.

    Raises:
        DataError: if there is none.
    """
    runs = [_read(path) for path in sorted(_folders(folder), key=_natural)]
    if not runs:
        raise DataError(f"no run in '{folder}': nowhere below it is a {RECORD} or a {METRICS}")
    metric = _choose(runs, ranking)
    if metric is not None:
        runs = [replace(run, value=ranking.judge(metric, run.metrics.get(metric, ([], []))[1])) for run in runs]
        sign = -1 if ranking.maximizes(metric) else 1
        runs.sort(key=lambda run: math.inf if run.value is None else sign * run.value)
    return Summary(folder, metric, tuple(_labelled(runs)))


def metrics_of(folder: Path) -> Metrics:
    """What a run logged; of one with several stages, such as the quickstart, the stage that logged last."""
    files = [folder / METRICS] if (folder / METRICS).is_file() else list(folder.glob(f"*/{METRICS}"))
    return read_metrics(max(files, key=lambda path: path.stat().st_mtime)) if files else {}


def figure_of(run: SweptRun, name: str, metric: str | None) -> float | None:
    """What a run came to in a metric: the value that ranks it, or the mean over the last tenth of the values."""
    return run.value if name == metric else _AVERAGE.judge(name, run.metrics.get(name, ([], []))[1])


def _folders(folder: Path) -> list[Path]:
    """The folders of the runs; the stages of a run are no runs of their own."""
    records = {path.parent for path in folder.rglob(RECORD)}
    alone = {path.parent for path in folder.rglob(METRICS) if not records & {path.parent, *path.parents}}
    return [*records, *alone]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Folders 2 and 10 in this order."""
    return [(int(part), "") if part.isdigit() else (10**9, part) for part in path.parts]


def _read(folder: Path) -> SweptRun:
    try:
        return _read_whole(folder)
    except DataError as error:  # of this run, and no reason to say nothing of the others
        return SweptRun(folder, "", {}, "damaged", error=str(error))


def _read_whole(folder: Path) -> SweptRun:
    record: dict[str, Any] = read_json(folder / RECORD) or _recorded_by_hydra(folder)
    status, seconds = str(record.get("status", "alone")), record.get("seconds")
    return SweptRun(
        folder=folder,
        recipe=str(record.get("recipe", "")),
        settings=dict(_setting(text) for text in record.get("overrides", ())),
        status=status,
        seconds=None if seconds is None or status == "unfinished" else float(seconds),
        error=record.get("error"),
        metrics=metrics_of(folder),
    )


def _recorded_by_hydra(folder: Path) -> dict[str, Any]:
    """How a run outside a sweep was started."""
    from omegaconf import OmegaConf

    hydra, overrides = folder / ".hydra" / "hydra.yaml", folder / ".hydra" / "overrides.yaml"
    if not (hydra.is_file() and overrides.is_file()):
        return {}
    recipe = OmegaConf.select(OmegaConf.load(hydra), "hydra.job.config_name")
    return {"recipe": recipe, "overrides": list(OmegaConf.load(overrides))}


def _setting(override: str) -> tuple[str, str]:
    key, _, value = override.lstrip("+").partition("=")
    return key, str(without_credentials(value.strip("'\"")))


def _choose(runs: Sequence[SweptRun], ranking: SweepConfig) -> str | None:
    """The metric that ranks, one that all runs logged if there is such a one."""
    logged = [set(run.metrics) for run in runs if run.metrics]
    if not logged:
        return None
    return ranking.choose(set.intersection(*logged)) or ranking.choose(set.union(*logged))


def _labelled(runs: Sequence[SweptRun]) -> list[SweptRun]:
    """The runs with what differs between them; the part of a path that all have in common says nothing."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "output_dir")
    varied = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    common = {key: _common_folder([run.settings.get(key, "") for run in runs]) for key in varied}
    named = []
    for run in runs:
        differs = {key: run.settings[key].removeprefix(common[key]) for key in varied if key in run.settings}
        words = [
            _brief(text) if len(varied) == 1 else f"{_short(k, varied)}={_brief(text)}" for k, text in differs.items()
        ]
        named.append(replace(run, differs=differs, label=", ".join(words) or run.folder.name))
    return named


def _common_folder(values: Sequence[str]) -> str:
    folder = os.path.commonprefix(values).rpartition("/")[0]
    return f"{folder}/" if folder else ""


def _short(key: str, keys: Sequence[str]) -> str:
    """The last word of a key, or all of it where another key ends alike."""
    last = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == last for other in keys) > 1 else last


def _brief(text: str) -> str:
    """A number with four digits; other text as it is."""
    try:
        return text if text.isdigit() else f"{float(text):.4g}"
    except ValueError:
        return text


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _clip(error: str) -> str:
    """The beginning of an error, in one line."""
    line = " ".join(error.split())
    return line if len(line) <= 100 else f"{line[:97]}..."


def _place(run: SweptRun, folder: Path) -> str:
    return run.folder.relative_to(folder).as_posix()


def _write_table(summary: Summary, path: Path) -> None:
    keys = list(dict.fromkeys(key for run in summary.runs for key in run.differs))
    names = summary.figures
    new = path.with_name(f"{path.name}.new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *keys, "status", *names, "steps", "seconds", "error"])
        for run in summary.runs:
            figures = [figure_of(run, name, summary.metric) for name in names]
            settings = [run.settings.get(key, "") for key in keys]
            end = [run.steps, run.seconds, run.error]
            writer.writerow([_place(run, summary.folder), *settings, run.status, *figures, *end])
    new.replace(path)
