"""The page of one run, from what stands in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_hybrid.report.charts import Line, duration, histogram, line_chart, number, share_bar
from lightning_hybrid.report.metrics import Metrics
from lightning_hybrid.report.page import (
    Comparison,
    as_json,
    folded,
    response,
    samples_before_and_after,
    section,
    table,
    tiles,
    write_page,
)
from lightning_hybrid.report.panels import SECONDS, STAGES, Panel, panels_for, phases_of
from lightning_hybrid.report.runs import RecordedRun, Sample, read_run

_SPREADS = {  # what rollouts.json holds: what it is called, and its unit
    "length": ("Response length", "tokens"),
    "kl": ("KL to the reference", "nats per response"),
    "score": ("Reward", "score"),
}
_HELD_OUT = 8  # prompts
_LEAST_TENTH = 10  # points, from which the ends of a curve are means over a tenth of it


def report_run(folder: str | Path) -> Path:
    """Write ``report.html`` into the folder of a run, from what the run has written there so far.

    Args:
        folder: of the run.

    Returns:
        The page.

    Raises:
        DataError: if the folder is not a run's, or one of its files is damaged.
    """
    run = read_run(folder)
    parts = [
        _status(run),
        tiles(_headline(run)),
        section("curves", "Curves", _curves(run)),
        section("phases", "Where the time went", _phases(run.metrics)),
        section("rollouts", "Responses, at the beginning and at the end", _spreads(run.rollouts)),
        _held_out(run.evaluation),
        _samples(run.samples),
        folded("All other metrics", _other_curves(run)),
        folded("Configuration", None if run.config is None else as_json(run.config)),
        folded("Versions", _versions(run.facts)),
    ]
    name = STAGES[run.recipe][0] if run.recipe in STAGES else run.recipe
    return write_page(run.folder / "report.html", f"{name} · {'/'.join(run.folder.resolve().parts[-2:])}", parts)


def _status(run: RecordedRun) -> str:
    said = [str(run.facts[key]) for key in ("status", "device") if run.facts.get(key)]
    said += [f"seed {run.config['seed']}"] if run.config and "seed" in run.config else []
    said += [str(run.folder.resolve())]
    return f'<p class="subtitle">{escape(" · ".join(said))}</p>'


# ---- figures ---------------------------------------------------------------------------------------------------------


def _headline(run: RecordedRun) -> dict[str, str]:
    """How the first panels' metrics went, how far the run came, and how long it took."""
    cards: dict[str, str] = {}
    panels = [panel for panel in panels_for(run.recipe, run.metrics) if panel.train != SECONDS]
    for panel in panels[:2]:
        if panel.train in run.metrics:
            cards[f"{panel.title}, {panel.unit}"] = _from_to(run.metrics[panel.train][1])
        if panel.validation is not None and panel.validation in run.metrics:
            cards[f"{panel.title}, validation"] = _from_to(run.metrics[panel.validation][1])
    if run.facts.get("steps") is not None:
        planned = run.facts.get("planned_steps")
        cards["steps"] = f"{run.facts['steps']:,}" + (f" of {planned:,}" if planned else "")
    if run.facts.get("seconds"):
        cards["time in training"] = duration(float(run.facts["seconds"]))
    speeds = run.metrics.get("throughput/rollout_tokens_per_second")
    if speeds:
        cards["sampled tokens per second"] = number(_mean(speeds[1]))
    return cards


def _from_to(values: Sequence[float]) -> str:
    """The ends of a curve: means over a tenth of it where it is long, otherwise its points."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return number(finite[0]) if finite else "not finite"
    count = len(finite) // 10 if len(finite) >= _LEAST_TENTH else 1
    return f"{number(_mean(finite[:count]))} → {number(_mean(finite[-count:]))}"


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


# ---- curves ----------------------------------------------------------------------------------------------------------


def _curves(run: RecordedRun) -> str:
    charts = [chart_of(panel, run.recipe, run.metrics) for panel in panels_for(run.recipe, run.metrics)]
    if not charts:
        why = "it logged to no table (logger=none), or came to no step that is logged"
        return f'<p class="note">There are no curves: {why}.</p>'
    return grid(charts)


def chart_of(panel: Panel, recipe: str, metrics: Metrics) -> str:
    """The chart of one panel."""
    counted = STAGES[recipe][1] if recipe in STAGES else "step"
    lines = [Line(_name_of(name), *metrics[name]) for name in panel.shows(metrics)]
    return line_chart(panel.title, panel.unit, counted, lines)


def _name_of(metric: str) -> str:
    if metric.startswith(SECONDS):
        return metric.removeprefix(SECONDS)
    return "validation" if metric.startswith("val/") else "training"


def grid(charts: Sequence[str]) -> str:
    """Charts beside each other, as many as there is room for."""
    few = " few" if len(charts) < 3 else ""
    return f'<div class="charts{few}">{"".join(charts)}</div>'


def _other_curves(run: RecordedRun) -> str | None:
    """Everything else that was logged, training and validation in one chart."""
    shown = {name for panel in panels_for(run.recipe, run.metrics) for name in panel.shows(run.metrics)}
    names = dict.fromkeys(name.removeprefix("val/") for name in run.metrics if name not in shown)
    panels = [Panel(name, "", name, f"val/{name}") for name in sorted(names)]
    return grid([chart_of(panel, run.recipe, run.metrics) for panel in panels]) if panels else None


def _phases(metrics: Metrics) -> str:
    return share_bar({name: math.fsum(metrics[f"{SECONDS}{name}"][1]) for name in phases_of(metrics)})


def _spreads(rollouts: Mapping[str, Any]) -> str:
    """Histograms of the first and of the last rollouts."""
    charts = []
    for key, (title, unit) in _SPREADS.items():
        sets = {_when(end): end[key] for end in (rollouts.get("first"), rollouts.get("last")) if end and end.get(key)}
        charts.append(histogram(title, unit, sets) if sets else "")
    drawn = [chart for chart in charts if chart]
    return grid(drawn) if drawn else ""


def _when(end: Mapping[str, Any]) -> str:
    first, last = end["steps"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


# ---- samples, versions -----------------------------------------------------------------------------------------------


def _samples(samples: Sequence[Sample]) -> str:
    """The first and the last responses that were logged; to the same prompts where there are such."""
    if not samples:
        return ""
    first = [sample for sample in samples if sample.step == samples[0].step]
    last = [sample for sample in samples if sample.step == samples[-1].step]
    if first[0].step == last[0].step:
        return section("samples", "Samples", _columns([(f"after step {last[0].step}", last)]))
    later = {sample.prompt: sample for sample in last}
    if all(sample.prompt in later for sample in first):
        pairs = [(sample, later[sample.prompt]) for sample in first]
        return samples_before_and_after(
            [Comparison(a.prompt, a.response, b.response, a.score, b.score) for a, b in pairs]
        )
    ends = [(f"first, after step {first[0].step}", first), (f"last, after step {last[0].step}", last)]
    return section("samples", "Samples", _columns(ends))


def _held_out(evaluation: Sequence[Sample]) -> str:
    """The last responses to held-out prompts, beside those of the reference, or else the first ones."""
    last = [sample for sample in evaluation if sample.step == evaluation[-1].step][:_HELD_OUT]
    first = {sample.prompt: (sample.response, sample.score) for sample in reversed(evaluation)}
    pairs = [(sample, sample.reference or first[sample.prompt]) for sample in last]
    if not pairs:
        return ""
    rows = [Comparison(new.prompt, old[0], new.response, old[1], new.score) for new, old in pairs]
    before = "the reference" if last[0].reference else f"step {evaluation[0].step}"
    title = f"Held-out prompts: before, {before}; after, step {last[0].step}"
    return samples_before_and_after(rows, title, "evaluation")


def _columns(ends: Sequence[tuple[str, Sequence[Sample]]]) -> str:
    columns = [f"<div><h3>{escape(name)}</h3>{''.join(map(_card, samples))}</div>" for name, samples in ends]
    return f'<div class="columns">{"".join(columns)}</div>'


def _card(sample: Sample) -> str:
    given = f'<p class="given" dir="auto">{escape(sample.prompt)}</p>'
    return f'<div class="sample">{given}{response(sample.response, sample.score)}</div>'


def _versions(facts: Mapping[str, Any]) -> str | None:
    versions = facts.get("versions")
    return (
        table(("package", "version"), [(name, str(version)) for name, version in versions.items()])
        if versions
        else None
    )
