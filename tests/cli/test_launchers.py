"""Sweeps on the launchers of others: the same folders, records and summary as one after another."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_hybrid.data.task import TaskSizes, write_task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"]


def start(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "launcher"),
    [
        ("hydra_plugins.hydra_joblib_launcher", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
        ("hydra_plugins.hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),
    ],
    ids=["joblib", "submitit"],
)
def test_jobs_run_at_once_and_are_summed_up(
    tmp_path: Path, plugin: str, launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two waits for the other, so one after another they would fail."""
    monkeypatch.setenv("TOGETHER", "2")
    pytest.importorskip(plugin, reason=f"{plugin} is not installed; it is in the sweep extra")
    values = ["algorithm.kl_coef=0.1,0.3,0.9", "output_dir=out", "hydra.sweep.dir=swept"]
    ended = start(HERE / "swept.py", tmp_path, "-m", *NEEDED, *values, *launcher)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.endswith("error: 1 of 3 runs of the sweep failed\n")
    rows = table(tmp_path / "swept")
    assert [(row["run"], row["status"]) for row in rows] == [("0", "done"), ("1", "done"), ("2", "failed")]
    assert [float(row["reward/score"]) for row in rows[:2]] == pytest.approx([1.0, 0.8])
    assert rows[2]["error"] == "the judge is away"
    first, second = ((tmp_path / "swept" / name / "process").read_text() for name in "01")
    assert first != second


@pytest.mark.slow
def test_optuna_asks_for_as_many_runs_at_a_time_as_it_may(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is in the sweep extra")
    pytest.importorskip("optuna", reason="optuna is in the sweep extra")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", "sweep.metric=reward/score"]
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=swept"]
    space = "algorithm.kl_coef=interval(0.01,0.4)"
    ended = start(HERE / "swept.py", tmp_path, "-m", *NEEDED, *search, *launcher, space)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best of 3 runs: algorithm.kl_coef=" in ended.stdout
    assert sorted(row["run"] for row in table(tmp_path / "swept")) == ["0", "1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_training_on_two_ranks_in_each_run_of_a_sweep(tmp_path: Path, launcher: list[str]) -> None:
    """One after another, nothing of the first must be left; at once, the two must not meet on one port."""
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is in the sweep extra")
    write_task(tmp_path / "task", 0, TaskSizes())
    settings = [
        "model=tiny_llama",
        f"model.tokenizer={tmp_path}/task/tokenizer",
        f"data.path={tmp_path}/task/sft.jsonl",
    ]
    settings += ["data.batch_size=8", "data.limit=64", "trainer=cpu", "trainer.devices=2", "trainer.max_steps=3"]
    settings += ["trainer.log_every_n_steps=1", "trainer.enable_checkpointing=false", "callbacks.export_model=false"]
    few = ["trainer.enable_progress_bar=false", "strategy=hybrid_deepspeed_stage_1", "hydra.sweep.dir=swept"]
    command = ROOT / "lightning_hybrid_cli.py"
    ended = start(command, tmp_path, "sft", "-m", *settings, *few, "algorithm.lr=0.001,0.02", *launcher)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = table(tmp_path / "swept")
    assert [row["algorithm.lr"] for row in rows] == ["0.02", "0.001"]  # in three steps the fast one gets further
    assert {row["steps"] for row in rows} == {"3"}
    assert {path.name for path in tmp_path.iterdir()} == {"task", "swept"}
