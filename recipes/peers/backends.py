"""Native and vLLM inside PPO: a table of both for each ZeRO stage and number of ranks, and one of orders of pushing."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers.base import why_not_importable
from peers.cell import Cell, run_cell
from peers.pushes import OURS, THEIRS
from peers.report import Panel, print_table, size

BACKENDS = ("native", "vllm")

FOOTNOTES = """\
tokens/s         sampled tokens of all ranks over the seconds that rank 0 generates
native is        times as fast as this one in tokens/s: median of the ratios of the rounds, which take turns
rollout          seconds of the phase as the trainer sees it, with binding, push, wake and sleep
resident         of rank 0 at most, its libraries included: what was there before a model (CUDA: of the whole device)
gap              |Δ| of log-probs of the sampled tokens between rollout and training forward, nats
per parameter    OpenRLHF's order: gather, a call of vLLM's load_weights and a barrier for each parameter
wrong by         largest |Δ| of log-probs after a push of changed weights to the training forward, nats"""


@dataclass
class Measured:
    """A cell and what each round of it gave; ``note`` says why there are no figures."""

    cell: Cell
    rounds: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None

    def median(self, figure: str) -> float:
        """Of an iteration's figure over all iterations of all rounds."""
        return statistics.median(self._every(figure))

    def most(self, figure: str) -> float:
        """The largest of an iteration's figure."""
        return max(self._every(figure))

    def _every(self, figure: str) -> list[float]:
        return [float(one[figure]) for taken in self.rounds for one in taken["iterations"]]

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each round."""
        return [_speed(taken) for taken in self.rounds]

    def resident(self, phase: str) -> int:
        """Bytes of rank 0 in a phase, median of the rounds."""
        return int(statistics.median(int(taken["resident"][phase]) for taken in self.rounds))

    @property
    def libraries(self) -> int:
        """Bytes of rank 0 before there was a model, median of the rounds."""
        return int(statistics.median(int(taken["libraries"]) for taken in self.rounds))

    def pushes(self, order: str) -> list[dict[str, Any]]:
        """Every push in one order."""
        return [push for taken in self.rounds for push in taken["pushes"] if push["order"] == order]


def _speed(taken: dict[str, Any]) -> float:
    return statistics.median(float(one["tokens"] / one["generate"]) for one in taken["iterations"])


def compare_backends(cells: Sequence[Cell], rounds: int, figures: Path) -> list[Measured]:
    """Run every cell once in each round, one after another; one that fails is not run again.

    Args:
        cells: to run.
        rounds: how often.
        figures: file for all figures, written anew after each cell, which may take minutes.
    """
    measured = [Measured(cell) for cell in cells]
    absent = why_not_importable("vllm")
    for one in measured:
        if one.cell.backend == "vllm" and absent is not None:
            one.note = f"absent: {absent}"
    for number in range(rounds):
        for one in measured:
            if one.note is None:
                _take(one)
                print(f"round {number + 1} of {rounds}: {_name(one)}: {one.note or 'done'}", flush=True)
            write_json(measured, figures)
    return measured


def _take(one: Measured) -> None:
    taken = run_cell(one.cell)
    if "failed" in taken:
        one.note = f"failed: {taken['failed']}"
    else:
        one.rounds.append(taken)


def print_backends(measured: Sequence[Measured]) -> None:
    """Print both tables, and who is absent or failed."""
    print_table([_HEADER, *(_figures(one, _native(measured, one)) for one in measured if one.rounds)])
    for one in measured:
        if one.note is not None:
            print(f"{_name(one)}: {one.note}")
    pushed = [one for one in measured if any(taken["pushes"] for taken in one.rounds)]
    if pushed:
        print("\nA push of all weights to vLLM, in seconds:")
        print_table([_PUSH_HEADER, *map(_push_figures, pushed)])


_HEADER = (
    *("", "tokens/s", "native is", "rollout, s", "generate", "push", "wake+sleep"),
    *("resident: generate", "train", "libraries", "gap: mean", "max", "tokens"),
)
_PUSH_HEADER = ("", OURS, THEIRS, "times as long", "calls", "MiB", "wrong by", "per parameter")


def _figures(one: Measured, native: Measured | None) -> tuple[str, ...]:
    ratio = "–"
    if native is not None and native is not one and native.rounds:
        pairs = zip(native.speeds, one.speeds, strict=False)
        ratio = f"{statistics.median(ours / theirs for ours, theirs in pairs):.2f} ×"
    return (
        _name(one),
        f"{statistics.median(one.speeds):,.0f}",
        ratio,
        f"{one.median('rollout'):.3f}",
        f"{one.median('generate'):.3f}",
        f"{one.median('push'):.4f}",
        f"{one.median('wake') + one.median('sleep'):.4f}",
        size(one.resident("rollout")),
        size(one.resident("update")),
        size(one.libraries),
        f"{one.median('gap_mean'):.1e}",
        f"{one.most('gap_max'):.1e}",
        f"{one.median('tokens'):,.0f}",
    )


def _native(measured: Sequence[Measured], one: Measured) -> Measured | None:
    """The native backend's cell of the same stage and ranks."""
    same = (one.cell.stage, one.cell.ranks)
    found = (m for m in measured if m.cell.backend == "native" and (m.cell.stage, m.cell.ranks) == same)
    return next(found, None)


def _push_figures(one: Measured) -> tuple[str, ...]:
    ours, theirs = one.pushes(OURS), one.pushes(THEIRS)
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    return (
        f"ZeRO-{one.cell.stage}, {_ranks(one.cell)}",
        f"{statistics.median(push['seconds'] for push in ours):.4f}",
        f"{statistics.median(push['seconds'] for push in theirs):.4f}",
        f"{statistics.median(ratios):.2f} ×",
        str(theirs[0]["calls"]),
        f"{theirs[0]['bytes'] / 2**20:,.0f}",
        f"{max(push['gap'] for push in ours):.1e}",
        f"{max(push['gap'] for push in theirs):.1e}",
    )


def _name(one: Measured) -> str:
    return f"ZeRO-{one.cell.stage}, {_ranks(one.cell)}, {one.cell.backend}"


def _ranks(cell: Cell) -> str:
    return "1 rank" if cell.ranks == 1 else f"{cell.ranks} ranks"


def write_json(measured: Sequence[Measured], path: Path) -> None:
    """All figures of all rounds, with how loaded the machine was."""
    cells = [{**asdict(one.cell), "note": one.note, "rounds": one.rounds} for one in measured]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cpus": os.cpu_count(), "cells": cells}, indent=1))


def loads(measured: Sequence[Measured]) -> str:
    """How loaded the machine was while cells ran, the cells themselves included."""
    found = [taken["load"] for one in measured for taken in one.rounds]
    if not found:
        return "nothing ran"
    return f"load of the machine {min(found):.1f} to {max(found):.1f} on {os.cpu_count()} CPUs, the cells' own included"


def panels_of(measured: Sequence[Measured], title: str) -> list[Panel]:
    """Tokens per second of what was measured, native first."""
    return list(_panels([one for one in measured if one.rounds], title))


def _panels(measured: Sequence[Measured], title: str) -> Iterator[Panel]:
    for stage, ranks in dict.fromkeys((one.cell.stage, one.cell.ranks) for one in measured):
        same = [one for one in measured if (one.cell.stage, one.cell.ranks) == (stage, ranks)]
        bars = tuple((one.cell.backend, statistics.median(one.speeds)) for one in same)
        yield Panel(f"{title}, ZeRO-{stage}, {_ranks(same[0].cell)}", "tokens/s inside PPO", bars)
