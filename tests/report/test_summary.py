"""What a sweep came to, read from the folders of its runs."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from lightning_hybrid.config import SweepConfig
from lightning_hybrid.errors import DataError
from lightning_hybrid.report.style import CYCLE
from lightning_hybrid.report.summary import summarize, write_summary

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, overrides: list[str], scores: list[float], status: str = "done", **record: object) -> None:
    folder.mkdir(parents=True)
    facts = {"recipe": "ppo", "overrides": overrides, "status": status, "seconds": 2.0, "error": None} | record
    (folder / "job.json").write_text(json.dumps(facts))
    if scores:
        rows = [f"{score},{score / 2},{step},0" for step, score in enumerate(scores)]
        (folder / "metrics.csv").write_text("\n".join(["reward/score,policy/kl,step,epoch", *rows, ""]))


@pytest.mark.parametrize(
    ("overrides", "labels"),
    [
        (["experiment=film/grpo", "experiment=film/rloo"], ["grpo", "rloo"]),
        (["++algorithm.kl_coef=0.05", "++algorithm.kl_coef=0.123456"], ["0.05", "0.1235"]),
        (["seed=0 data.limit=1000", "seed=1 data.limit=1000"], ["0", "1"]),
        (["seed=0 ++a.lr=1", "seed=1 ++a.lr=2"], ["seed=0, lr=1", "seed=1, lr=2"]),
        (
            ["++actor.lr=1 ++critic.lr=2", "++actor.lr=2 ++critic.lr=1"],
            ["actor.lr=1, critic.lr=2", "actor.lr=2, critic.lr=1"],
        ),
        (["seed=0", "seed=0"], ["0", "1"]),  # nothing differs: the folder
        (["seed=0", "seed=0 algorithm=grpo"], ["0", "grpo"]),
    ],
)
def test_label_is_what_differs(tmp_path: Path, overrides: list[str], labels: list[str]) -> None:
    for number, text in enumerate(overrides):
        run(tmp_path / str(number), text.split(), [1.0 - number])
    assert [one.label for one in summarize(tmp_path, SweepConfig()).runs] == labels


def test_last_is_the_mean_over_the_last_tenth() -> None:
    values = [float(value) for value in range(25)]
    assert SweepConfig().judge("reward/score", values) == (23 + 24) / 2
    assert SweepConfig().judge("val/loss", [3.0, 2.0, 4.0]) == 4.0
    assert SweepConfig(value="best").judge("val/loss", [3.0, 2.0, math.nan, 4.0]) == 2.0
    assert SweepConfig(value="best").judge("reward/score", [3.0, math.inf, 4.0]) == 4.0
    assert SweepConfig(value="best", direction="minimize").judge("reward/score", [3.0, 4.0]) == 3.0


def test_diverging_is_no_value() -> None:
    assert SweepConfig().judge("loss", [1.0, math.nan]) is None
    assert SweepConfig(value="best").judge("loss", [math.nan]) is None
    assert SweepConfig().judge("loss", []) is None


def test_runs_without_a_value_come_last(tmp_path: Path) -> None:
    run(tmp_path / "0", ["seed=0"], [], status="failed", error="no\nluck")
    run(tmp_path / "1", ["seed=1"], [1.0, 2.0])
    run(tmp_path / "2", ["seed=2"], [1.0, math.nan])
    run(tmp_path / "10", ["seed=10"], [1.0, 3.0], status="unfinished")
    summary = summarize(tmp_path, SweepConfig())
    assert [one.folder.name for one in summary.runs] == ["10", "1", "0", "2"]
    assert [one.seconds for one in summary.runs] == [None, 2.0, 2.0, 2.0]
    assert summary.metric == "reward/score"
    lines = str(summary).splitlines()
    assert lines[0].split() == ["run", "seed", "reward/score", "policy/kl", "steps", "seconds"]
    assert lines[1].split() == ["10", "10", "3", "1.5", "2", "unfinished"]
    assert lines[3].split() == ["0", "0", "0", "2.0", "failed:", "no", "luck"]


def test_pieces_of_a_sweep_in_several_folders_are_one(tmp_path: Path) -> None:
    """Two sweeps, and a run alone that only Hydra recorded."""
    run(tmp_path / "monday" / "0", ["seed=0"], [1.0])
    run(tmp_path / "tuesday" / "0", ["seed=1"], [3.0])
    alone = tmp_path / "alone"
    run(alone, [], [2.0])
    (alone / "job.json").unlink()
    (alone / ".hydra").mkdir()
    (alone / ".hydra" / "overrides.yaml").write_text("- seed=2\n")
    (alone / ".hydra" / "hydra.yaml").write_text("hydra: {job: {config_name: ppo}}\n")
    write_summary(tmp_path, SweepConfig())
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = [(row["run"], row["seed"], row["status"]) for row in csv.DictReader(file)]
    assert rows == [("tuesday/0", "1", "done"), ("alone", "2", "alone"), ("monday/0", "0", "done")]


def test_stages_of_a_quickstart_are_one_run(tmp_path: Path) -> None:
    run(tmp_path / "0", ["seed=0"], [], recipe="quickstart")
    for stage, header in (("sft", "loss"), ("ppo", "reward/score")):
        (tmp_path / "0" / stage).mkdir()
        (tmp_path / "0" / stage / "metrics.csv").write_text(f"{header},step,epoch\n0.5,0,0\n")
    os.utime(tmp_path / "0" / "sft" / "metrics.csv", (1, 1))
    summary = summarize(tmp_path, SweepConfig())
    assert [(one.folder.name, one.value) for one in summary.runs] == [("0", 0.5)]
    assert summary.metric == "reward/score"


@pytest.mark.parametrize("count", [1, 4, 12])
def test_picture_has_a_colour_for_each_of_the_best_seven(tmp_path: Path, count: int) -> None:
    for number in range(count):
        run(tmp_path / str(number), [f"seed={number}"], [float(number), float(number) + 0.5])
    write_summary(tmp_path, SweepConfig())
    image = (matplotlib.image.imread(tmp_path / "summary.png")[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    seen = {bytes(pixel).hex().upper() for pixel in np.unique(image, axis=0).tolist()}
    colors = CYCLE[:-1]  # the last is a grey, which the edges of letters have too
    assert [color.strip("#") in seen for color in colors] == [place < count for place in range(len(colors))]
    assert image.shape[0] > 800 * 400


def test_nothing_to_sum_up_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run in .*: nowhere below it is a job.json or a metrics.csv"):
        write_summary(tmp_path, SweepConfig())


def test_damaged_runs_are_rows_with_what_is_wrong(tmp_path: Path) -> None:
    for number in range(3):
        run(tmp_path / str(number), [f"seed={number}"], [1.0])
    (tmp_path / "0" / "job.json").write_text('{"recipe": "ppo", ')
    (tmp_path / "1" / "metrics.csv").write_text("reward/score,step\nmuch,0\n")
    summary = write_summary(tmp_path, SweepConfig())
    assert [(one.folder.name, one.status) for one in summary.runs] == [
        ("2", "done"),
        ("0", "damaged"),
        ("1", "damaged"),
    ]
    assert [one.folder.name for one in summary.failed] == ["0", "1"]
    rows = (tmp_path / "summary.csv").read_text().splitlines()
    assert "0/job.json cannot be read" in rows[2]
    assert "1/metrics.csv:2: not a row of metrics" in rows[3]


def test_secrets_in_addresses_stay_out_of_the_table(tmp_path: Path) -> None:
    for number in range(2):
        run(
            tmp_path / str(number),
            [f"reward.url='https://me:secret@judge-{number}.example/score?api_key=secret'"],
            [1.0],
        )
    write_summary(tmp_path, SweepConfig())
    table = (tmp_path / "summary.csv").read_text()
    assert "judge-1.example/score?…" in table
    assert "secret" not in table


def summary_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "lightning_hybrid_cli.py"), "summary", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_command_sums_up_a_folder_and_says_what_is_wrong(tmp_path: Path) -> None:
    run(tmp_path / "0", ["seed=0"], [1.0])
    run(tmp_path / "1", ["seed=1"], [2.0])
    ended = summary_command(str(tmp_path), "metric=policy/kl", "direction=minimize")
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[:3] for line in ended.stdout.splitlines()[:2]] == [
        ["run", "seed", "policy/kl"],
        ["0", "0", "0.5"],
    ]
    wrong = summary_command(str(tmp_path), "metric=policy/lk")
    assert wrong.returncode != 0
    assert "error: metric = policy/lk: no run logged it; there are reward/score, policy/kl" in wrong.stderr
