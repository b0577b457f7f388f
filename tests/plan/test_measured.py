"""The plan against what processes really take: PPO on a CPU, phase by phase."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.engines.config import merged
from tests.plan.measuring import ENVIRONMENT, measure
from tests.plan.plans import CPU_RUN, LLAMA, plan_of

CLOSE = 0.1
# Of a base that ZeRO-3 shards under an adapter, part of the buffer that it arrives in lives on into the backward pass.
CLOSE_SHARDED_BASE = 0.12
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
    """Every phase of every rank is as close as it is to be to what was planned."""
    close = CLOSE_SHARDED_BASE if stage == 3 and ranks > 1 and "adapter" in run["model"] else CLOSE
    zero = {"zero_optimization": {"stage": stage}}
    plan = plan_of(
        run,
        strategy={"name": "hybrid_deepspeed", "config": zero},
        trainer={"devices": ranks, "precision": precision},
    )
    given = {name: run[name] for name in ("algorithm", "rollout", "roles", "ptx", "reward", "callbacks") if name in run}
    cell = given | {
        "architecture": run["model"]["architecture"],
        "stage": stage,
        "precision": precision,
        "ranks": ranks,
        "prompt": run["prompt_tokens"],
        "batch_size": run["data"]["batch_size"],
        "adapters": {name: value for name, value in run["model"].items() if name != "architecture"},
    }
    for output in run_ranks(measure, ranks, cell, timeout=600, env=ENVIRONMENT):
        measured = json.loads(output.split("measured:")[1])
        for phase, peak in plan.peaks.items():
            ratio = peak.bytes() / measured[phase]
            print(f"ZeRO-{stage} {precision} {ranks} ranks {phase}: {ratio:.3f} of {measured[phase] >> 20} MiB")
            assert ratio == pytest.approx(1.0, abs=close), (phase, peak.name)


# Fewer layers and tokens than the grid above, and several settings at once, each of another model or phase.
SMALLER = merged(
    CPU_RUN,
    {
        "model": {"architecture": LLAMA | {"num_hidden_layers": 4, "vocab_size": 4096}},
        "rollout": {"max_new_tokens": 16},
        "prompt_tokens": 112,
    },
)
TWICE = {"gradient_checkpointing": True}
SETTINGS: dict[str, tuple[dict[str, Any], int, int]] = {
    "group, text loss and average": (
        {
            "algorithm": {"name": "grpo", "group_size": 4, "ptx_coef": 1.0},
            "ptx": {"batch_size": 8, "max_length": 192, "too_long": "truncate"},
            "data": {"batch_size": 2},
            "callbacks": {"ema_decay": 0.9},
        },
        2,
        1,
    ),
    "adapters, layers computed twice": (
        {
            "model": {"adapter": {"r": 8}, "critic_adapter": {"r": 8}},
            "roles": {"actor": TWICE, "critic": TWICE},
            "algorithm": {"micro_batch_size": 8},
        },
        1,
        1,
    ),
    "adapters, shared": ({"model": {"adapter": {"r": 8}}, "algorithm": {"name": "rloo", "group_size": 2}}, 3, 2),
    "stages of their own": ({"roles": {"critic": {"zero_stage": 1}, "reference": {"zero_stage": 3}}}, 2, 2),
    "classifier and dynamic sampling": (
        {
            "algorithm": {"name": "dapo", "group_size": 4, "groups": 2},
            "data": {"batch_size": 3},
            "reward": {"terms": {"again": {"penalty": "repetition"}, "judge": {"classifier": {"batch_size": 4}}}},
        },
        2,
        1,
    ),
}


def with_files(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with texts longer than any row, and a decoder with two labels, where it asks for them."""
    if "ptx" in run:
        path = folder / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": "mia visits " * 400}) + "\n" for _ in range(16)))
        run = merged(run, {"ptx": {"path": str(path)}})
    if "reward" in run:
        config = AutoConfig.for_model(**LLAMA, num_labels=2, pad_token_id=0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        run = merged(run, {"reward": {"terms": {"judge": {"classifier": {"path": str(folder), "label": 1}}}}})
    return run


@pytest.mark.slow
@pytest.mark.parametrize("what", SETTINGS)
def test_runs_with_other_settings_take_what_was_planned(what: str, run_ranks: Any, tmp_path: Path) -> None:
    changes, stage, ranks = SETTINGS[what]
    compare(run_ranks, with_files(merged(SMALLER, changes), tmp_path), stage, "32-true", ranks)


@pytest.mark.slow
def test_a_run_takes_what_was_planned(run_ranks: Any) -> None:
    compare(run_ranks, QUICK, 2, "32-true", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision", "ranks"), CELLS)
def test_runs_take_what_was_planned(run_ranks: Any, stage: int, precision: str, ranks: int) -> None:
    compare(run_ranks, CPU_RUN, stage, precision, ranks)
