from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from lightning_hybrid.errors import DataError
from lightning_hybrid.report.compare_page import write_comparison
from lightning_hybrid.report.comparing import compare_runs, labels_of
from tests.report.runs import write_run
from tests.report.test_run_page import Page, titles

ROOT = Path(__file__).resolve().parents[2]
LOW, HIGH = {"algorithm": {"kl_coef": 0.01}, "seed": 0}, {"algorithm": {"kl_coef": 0.1, "eps": 2}, "seed": 0}


@pytest.fixture
def two(tmp_path):
    samples = [[(1, "shared", f"{name} first", 0.0), (9, "shared", f"{name} last", 1.0)] for name in "ab"]
    samples[0].append((9, "only in a", "x", 0.0))
    rising, falling = (
        {"reward/score": [0.0, *ends], "policy/kl": [0.0, 0.5, 1.0]} for ends in ([1.0, 2.0], [3.0, -1.0])
    )
    return [
        write_run(tmp_path / "low" / "ppo", rising, samples[0], config={**LOW, "output_dir": "x"}),
        write_run(tmp_path / "high" / "ppo", falling, samples[1], config={**HIGH, "output_dir": "y"}),
    ]


def test_settings_that_differ_are_named_and_no_others(two):
    assert compare_runs(two).settings == [["algorithm.kl_coef", "0.01", "0.1"], ["algorithm.eps", "not set", "2"]]


def test_last_and_best_values_stand_beside_each_other(two):
    rows = {name: values for name, *values in compare_runs(two).metrics}
    assert rows["reward/score, last"] == ["2.00", "-1.00"]
    assert rows["reward/score, highest"] == ["2.00 at step 2", "3.00 at step 1"]
    assert "policy/kl, highest" not in rows  # neither end of it is better
    assert rows["steps logged"] == ["3", "3"]


def test_the_last_value_is_a_mean_over_the_last_tenth(tmp_path):
    folders = [write_run(tmp_path / name, {"reward/score": [0.0] * 18 + [1.0, 2.0]}) for name in "ab"]
    assert compare_runs(folders).metrics[0] == ["reward/score, last", "1.50", "1.50"]


def test_responses_to_the_same_prompts_are_found(two):
    ((prompt, samples),) = compare_runs(two).samples
    assert prompt == "shared"
    assert [sample.response for sample in samples] == ["a last", "b last"]


def test_runs_are_called_by_what_tells_them_apart():
    assert labels_of([Path("/o/low/ppo"), Path("/o/high/ppo")]) == ("low/ppo", "high/ppo")
    assert labels_of([Path("/o/ppo"), Path("/o/grpo")]) == ("ppo", "grpo")


def test_page_and_picture_show_all_runs(two, tmp_path):
    page, picture = write_comparison(compare_runs(two), tmp_path / "new")
    assert titles(page)[:4] == ["Settings that differ", "Metrics", "Curves", "The last responses to the same prompts"]
    text = Page(page).text
    assert "low/ppo against high/ppo" in text
    assert "score 1.000, after step 9" in text
    assert imread(picture)[..., :3].min() < 0.5


def test_runs_of_different_recipes_are_compared_in_what_both_have(two, tmp_path):
    sft = write_run(tmp_path / "sft", {"loss": [3.0, 2.0]}, stage="sft", config=LOW)
    comparison = compare_runs([two[0], sft])
    rows = {name: values for name, *values in comparison.metrics}
    assert rows["loss, last"] == ["–", "2.00"]
    assert comparison.samples == []
    assert "samples: no prompt in common" in str(comparison)


def test_runs_of_a_recipe_that_has_no_panels_of_its_own_are_compared(tmp_path):
    folders = [write_run(tmp_path / name, {"reward/score": [0.0, 1.0]}, stage="mine") for name in "ab"]
    page, _ = write_comparison(compare_runs(folders), tmp_path / "new")
    assert "Curves" in titles(page)


def test_a_run_without_settings_is_named(two, tmp_path):
    bare = write_run(tmp_path / "bare")
    comparison = compare_runs([two[0], bare])
    assert "settings that differ: not known: bare kept none" in str(comparison)
    page, _ = write_comparison(comparison, tmp_path / "new")
    assert "The settings of bare are not known." in Page(page).text


def test_one_run_or_the_same_one_twice_is_refused(two):
    for folders in ([two[0]], [two[0], two[0]]):
        with pytest.raises(DataError, match="compare needs the folders of two different runs or more, got"):
            compare_runs(folders)


def command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, str(ROOT / "lightning_hybrid_cli.py"), "compare", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_prints_writes_and_refuses(two, tmp_path):
    done = command(tmp_path, *two)
    assert done.returncode == 0, done.stderr
    assert "reward/score, highest  2.00 at step 2  3.00 at step 1" in done.stdout
    assert (tmp_path / "comparison" / "compare.html").is_file()
    assert (tmp_path / "comparison" / "compare.png").is_file()
    wrong = command(tmp_path, two[0], tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith(f"error: '{tmp_path}' is not the folder of a run: it holds neither metrics.csv nor")
