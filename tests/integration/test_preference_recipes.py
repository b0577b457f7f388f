"""DPO and KTO on data that other people wrote, from the command line to folders that load."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_hybrid.models import load_policy
from tests.helpers import weights_of

ROOT = Path(__file__).resolve().parents[2]


def run(recipe: str, folder: Path, shared: Path, *overrides: str) -> list[dict[str, str]]:
    """The rows of its metrics."""
    command = [sys.executable, str(ROOT / "lightning_hybrid_cli.py"), recipe, f"root={folder}", f"shared={shared}"]
    few = ("trainer=cpu", "trainer.enable_checkpointing=false", "trainer.enable_progress_bar=false")
    ended = subprocess.run([*command, *few, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with (folder / recipe / "metrics.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_learns_the_preferences_of_sharegpt_pairs(tmp_path: Path, shared: Path, kind: str) -> None:
    overrides = ["data.limit=24", "data.validation_fraction=0", "data.max_length=96", "data.batch_size=8"]
    overrides += ["algorithm.lr=3e-4", f"algorithm.kind={kind}", "trainer.max_epochs=6", "callbacks.ema_decay=0.8"]
    rows = run("dpo", tmp_path, shared, "experiment=sharegpt_pairs/dpo", *overrides)
    start = {"sigmoid": 0.6931, "ipo": 25.0}[kind]  # log 2; 1 / (4 · 0.1²)
    assert float(rows[0]["loss"]) == pytest.approx(start, rel=1e-3)
    assert float(rows[0]["rewards/accuracy"]) == 0.5
    last = rows[-3:]  # an epoch
    assert sum(float(row["loss"]) for row in last) / 3 < 0.8 * start
    assert sum(float(row["rewards/accuracy"]) for row in last) / 3 > 0.8
    begun, average, own = (
        weights_of(load_policy(folder))
        for folder in (shared / "models" / "tinystories-656k", tmp_path / "dpo" / "ema", tmp_path / "dpo" / "model")
    )
    # The average lags behind, and is on its way.
    assert 0 < (average - own).norm() < (begun - own).norm()


@pytest.mark.slow
def test_kto_learns_which_reviews_are_good(tmp_path: Path, shared: Path) -> None:
    overrides = ["model.path=${shared}/models/tinystories-656k", "data.limit=192", "data.validation_path=null"]
    overrides += ["algorithm.lr=1e-3", "trainer.max_epochs=3"]
    rows = run("kto", tmp_path, shared, "experiment=movie_sentiment/kto", *overrides)
    assert float(rows[0]["loss"]) == pytest.approx(0.5, rel=1e-3)
    last = rows[-6:]  # an epoch
    assert sum(float(row["loss"]) for row in last) / 6 < 0.45
    assert sum(float(row["rewards/accuracy"]) for row in last) / 6 > 0.7
    assert all(float(row["kl"]) >= 0 for row in rows)
    load_policy(tmp_path / "kto" / "model")
