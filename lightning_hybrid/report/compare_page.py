"""The page and the picture of runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lightning_hybrid.report.charts import COLORS, Line, line_chart
from lightning_hybrid.report.comparing import RunComparison, shared_panels
from lightning_hybrid.report.overlay import draw_overlay
from lightning_hybrid.report.page import as_json, folded, response, section, table, write_page
from lightning_hybrid.report.panels import STAGES
from lightning_hybrid.report.run_page import grid
from lightning_hybrid.report.summary import Summary, SweptRun


def write_comparison(comparison: RunComparison, folder: str | Path) -> tuple[Path, Path | None]:
    """Write ``compare.html``, and ``compare.png`` with the curves over each other.

    Returns:
        Both; None for the picture where nothing was logged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    heads = ["", *comparison.labels]
    parts = [
        _runs_line(comparison),
        section("settings", "Settings that differ", _rows_or(heads, comparison.settings, comparison.without_config)),
        section("metrics", "Metrics", table(heads, comparison.metrics) if comparison.metrics else ""),
        section("curves", "Curves", _curves(comparison)),
        section("samples", "The last responses to the same prompts", _samples(comparison)),
        *(
            folded(f"Configuration of {label}", None if run.config is None else as_json(run.config))
            for label, run in zip(comparison.labels, comparison.runs, strict=True)
        ),
    ]
    page = write_page(folder / "compare.html", " against ".join(comparison.labels), parts)
    return page, _picture(comparison, folder / "compare.png")


def _runs_line(comparison: RunComparison) -> str:
    said = []
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        status = f", {run.facts['status']}" if run.facts.get("status") else ""
        said.append(f"{label}: {run.folder.resolve()}{status}")
    return f'<p class="subtitle">{"<br>".join(map(escape, said))}</p>'


def _rows_or(heads: Sequence[str], rows: Sequence[Sequence[str]], unknown: Sequence[str]) -> str:
    if unknown:
        return f'<p class="note">The settings of {escape(", ".join(unknown))} are not known.</p>'
    return table(heads, rows) if rows else '<p class="note">None: the runs have the same settings.</p>'


def _curves(comparison: RunComparison) -> str:
    runs = comparison.runs
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    counted = STAGES[comparison.recipe][1] if comparison.recipe in STAGES else "step"
    charts = []
    for panel in shared_panels(runs, list(logged)):
        for name in panel.shows(logged):
            title = panel.title if name == panel.train else f"{panel.title}, validation"
            pairs = zip(comparison.labels, runs, strict=True)
            # A run that did not log it keeps its colour for the others.
            lines = [Line(label, *run.metrics.get(name, ([], []))) for label, run in pairs][:COLORS]
            charts.append(line_chart(title, panel.unit, counted, lines))
    return grid(charts) if charts else '<p class="note">Nothing was logged to a table.</p>'


def _samples(comparison: RunComparison) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Prompt", *comparison.labels))
    rows = []
    for prompt, samples in comparison.samples:
        cells = "".join(
            f'<td data-label="{escape(label)}">{response(sample.response, sample.score, sample.step)}</td>'
            for label, sample in zip(comparison.labels, samples, strict=True)
        )
        rows.append(f'<tr><td data-label="Prompt"><p dir="auto">{escape(prompt)}</p></td>{cells}</tr>')
    body = "".join(rows)
    return f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>' if rows else ""


def _picture(comparison: RunComparison, path: Path) -> Path | None:
    runs = tuple(
        SweptRun(run.folder, run.recipe, {}, "alone", metrics=run.metrics, label=label)
        for run, label in zip(comparison.runs, comparison.labels, strict=True)
    )
    summary = Summary(path.parent, None, runs)
    if not summary.figures:
        return None
    draw_overlay(summary, path)
    return path
