"""The plan against what processes really take: PPO on a CPU, phase by phase."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_hybrid.engines.config import merged
from tests.plan.measuring import ENVIRONMENT, measure
from tests.plan.plans import CPU_RUN, LLAMA, plan_of

CLOSE = 0.1
CELLS = [
    (stage, precision, ranks)
    for ranks in (1, 2)
    for stage, precision in [
        (0, "32-true"),
        (1, "32-true"),
        (2, "32-true"),
        (3, "32-true"),
        (1, "bf16-mixed"),
        (2, "bf16-mixed"),
        (3, "bf16-mixed"),
    ]
]
# Memory depends on weights more than on tokens, time on both.
QUICK = merged(
    CPU_RUN,
    {
        "model": {"architecture": LLAMA | {"num_hidden_layers": 2, "vocab_size": 4096}},
        "data": {"batch_size": 2},
        "algorithm": {"micro_batch_size": 2},
        "rollout": {"max_new_tokens": 8},
        "prompt_tokens": 24,
    },
)


def compare(run_ranks: Any, run: dict[str, Any], stage: int, precision: str, ranks: int) -> None:
    """Every phase of every rank is within a tenth of what was planned."""
    zero = {"zero_optimization": {"stage": stage}}
    plan = plan_of(
        run,
        strategy={"name": "hybrid_deepspeed", "config": zero},
        trainer={"devices": ranks, "precision": precision},
    )
    cell = {name: run[name] for name in ("algorithm", "rollout")} | {
        "architecture": run["model"]["architecture"],
        "stage": stage,
        "precision": precision,
        "ranks": ranks,
        "prompt": run["prompt_tokens"],
        "batch_size": run["data"]["batch_size"],
    }
    for output in run_ranks(measure, ranks, cell, timeout=600, env=ENVIRONMENT):
        measured = json.loads(output.split("measured:")[1])
        for phase, peak in plan.peaks.items():
            ratio = peak.bytes() / measured[phase]
            print(f"ZeRO-{stage} {precision} {ranks} ranks {phase}: {ratio:.3f} of {measured[phase] >> 20} MiB")
            assert ratio == pytest.approx(1.0, abs=CLOSE), (phase, peak.name)


@pytest.mark.slow
def test_a_run_takes_what_was_planned(run_ranks: Any) -> None:
    compare(run_ranks, QUICK, 2, "32-true", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision", "ranks"), CELLS)
def test_runs_take_what_was_planned(run_ranks: Any, stage: int, precision: str, ranks: int) -> None:
    compare(run_ranks, CPU_RUN, stage, precision, ranks)
