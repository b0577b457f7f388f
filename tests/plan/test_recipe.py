"""The recipe: PPO's overrides in, a table out, nothing written and no engine loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lightning_hybrid.config import PlanRun, PPORun
from lightning_hybrid.config.run import compose_run
from tests.plan.plans import LLAMA

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path: Path) -> None:
    architecture = ",".join(f"{key}: {str(value).lower()}" for key, value in LLAMA.items())
    overrides = ["model.path=null", f"model.architecture={{{architecture}}}", "trainer=cpu"]
    command = [sys.executable, str(ROOT / "lightning_hybrid_cli.py"), "plan", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "GiB per rank" in ended.stdout
    assert all(f"\n{phase} " in ended.stdout for phase in ("generate", "score", "train"))
    assert list(tmp_path.iterdir()) == []


def test_experiments_of_ppo_are_planned_as_they_are() -> None:
    overrides = ["experiment=movie_sentiment/ppo", "strategy=hybrid_deepspeed_stage_3"]
    planned, run = compose_run("plan", PlanRun, overrides), compose_run("ppo", PPORun, overrides)
    assert planned.algorithm == run.algorithm
    assert planned.strategy == run.strategy
    assert planned.rollout == run.rollout
    assert planned.data.batch_size == run.data.batch_size
