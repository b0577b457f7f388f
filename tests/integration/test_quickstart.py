"""The command as a user calls it: the quickstart, a run and a sweep that build on its folders, and wrong input."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers import PPO_FIGURES
from tests.integration.processes import Ended, run

FEW_STEPS = {
    "sft": ["trainer.max_steps=3", "data.batch_size=16"],
    "reward": ["trainer.max_steps=3", "data.batch_size=16"],
    "ppo": ["trainer.max_steps=2", "data.batch_size=8", "algorithm.minibatch_size=4", "algorithm.epochs=1"],
}
PROMISED_COLUMNS = {
    "sft": {"step", "epoch", "loss"},
    "reward": {"step", "epoch", "loss", "accuracy", "margin"},
    "ppo": PPO_FIGURES | {"epoch", "lr", "optimizer_steps", "policy/kl_coef", "step"},
}


def call(folder: Path, *arguments: str) -> Ended:
    """`lightning-hybrid` with `arguments`, in `folder`."""
    return run([sys.executable, "-m", "lightning_hybrid_cli", *arguments], folder, timeout=90)


def quickstart(folder: Path, *for_every_stage: str) -> Ended:
    """The quickstart in `folder`/quickstart, cut down to a few steps."""
    changed = {stage: [*changes, *for_every_stage] for stage, changes in FEW_STEPS.items()}
    overrides = [f"overrides.{stage}={json.dumps(changes)}" for stage, changes in changed.items()]
    return call(folder, "quickstart", "output_dir=quickstart", "heldout_samples=8", *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Where the quickstart was called, and how it ended."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart(folder)


@pytest.fixture(scope="module")
def made(finished: tuple[Path, Ended]) -> Path:
    """The quickstart's folder, for whoever builds on it."""
    folder, ended = finished
    assert ended.code == 0, ended
    return folder / "quickstart"


def ppo(folder: Path, made: Path, *overrides: str) -> Ended:
    """PPO from what the quickstart left, in a few steps."""
    return call(folder, "ppo", "experiment=quickstart/ppo", f"root={made}", *FEW_STEPS["ppo"], *overrides)


def columns(run_folder: Path) -> set[str]:
    with (run_folder / "metrics.csv").open(newline="") as file:
        return set(next(csv.reader(file)))


def values(run_folder: Path, column: str) -> list[float]:
    with (run_folder / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_quickstart_ends_with_the_two_scores_and_the_distance(finished: tuple[Path, Ended]) -> None:
    _, ended = finished
    assert ended.code == 0, ended
    number = r"-?\d\.\d{3}"
    last = ended.out.splitlines()[-1]
    assert re.fullmatch(rf"gold score: sft={number} ppo={number} kl=-?\d+\.\d\d", last)


def test_quickstart_leaves_a_report_with_its_pictures_and_numbers(made: Path) -> None:
    assert "<html" in (made / "report.html").read_text()
    for picture in ("curves.png", "scores.png"):
        assert (made / picture).read_bytes().startswith(b"\x89PNG")
    comparison = json.loads((made / "comparison.json").read_text())
    assert {"sft", "ppo", "kl", "kl_per_token", "best", "seconds"} == set(comparison)
    assert list(comparison["seconds"]) == ["sft", "reward", "ppo", "comparison"]


def test_every_stage_leaves_a_plain_hugging_face_model(made: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for stage in ("sft", "ppo"):
        policy, report = AutoModelForCausalLM.from_pretrained(made / stage / "model", output_loading_info=True)
        assert not any(report.values()), stage
        assert policy.config.vocab_size == len(AutoTokenizer.from_pretrained(made / stage / "model"))
    reward, report = AutoModelForSequenceClassification.from_pretrained(
        made / "reward" / "model", output_loading_info=True
    )
    assert not any(report.values())
    assert reward.config.num_labels == 1


def test_samples_hold_prompt_response_and_score(made: Path) -> None:
    rows = [json.loads(line) for line in (made / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert rows
    prompts = {json.loads(line)["prompt"] for line in (made / "task" / "prompts.jsonl").read_text().splitlines()}
    for row in rows:
        assert set(row) == {"step", "prompt", "response", "score"}
        assert row["prompt"] in prompts
        assert isinstance(row["score"], float)


@pytest.mark.parametrize("stage", PROMISED_COLUMNS)
def test_metrics_have_the_promised_columns(stage: str, made: Path) -> None:
    assert columns(made / stage) >= PROMISED_COLUMNS[stage]


@pytest.mark.slow
def test_ppo_runs_on_earlier_folders_with_a_python_reward(made: Path, tmp_path: Path) -> None:
    from lightning_hybrid.data.task import gold_score

    reward = ["reward.path=null", "reward.function=lightning_hybrid.data.task:task_reward"]
    ended = ppo(tmp_path, made, *reward, "output_dir=with_function")
    assert ended.code == 0, ended
    assert (tmp_path / "with_function" / "model" / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (tmp_path / "with_function" / "samples.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([gold_score(row["response"]) for row in rows])


@pytest.mark.slow
def test_a_sweep_runs_each_value_in_a_folder_of_its_own(made: Path, tmp_path: Path) -> None:
    ended = ppo(tmp_path, made, "output_dir=sweep", "algorithm.kl_coef=0.01,0.5", "-m")
    assert ended.code == 0, ended
    folders = sorted((tmp_path / "sweep" / "multirun").glob("*/*/"))
    assert [folder.name for folder in folders] == ["0", "1"]
    assert [values(folder, "policy/kl_coef") for folder in folders] == [pytest.approx([k, k]) for k in (0.01, 0.5)]
    assert all((folder / "model" / "model.safetensors").is_file() for folder in folders)


@pytest.mark.slow
def test_two_processes_go_through_all_stages_together(tmp_path: Path) -> None:
    ended = quickstart(tmp_path, "trainer.devices=2")
    assert ended.code == 0, ended
    assert ended.out.count("gold score: ") == 1
    steps = values(tmp_path / "quickstart" / "ppo", "optimizer_steps")
    assert steps == [4.0, 8.0]  # 8 prompts of each rank in minibatches of 4


def refused(ended: Ended) -> str:
    """The report of a run that was refused: what its error stream ends with, and no traceback."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert "error: " in ended.err, ended  # "error (rank 0): " would say that more processes had been started first
    return ended.err[ended.err.index("error: ") :]


@pytest.mark.slow
def test_all_problems_of_a_command_are_reported_together(tmp_path: Path) -> None:
    wrong = ["algorithm.kl_ceof=0.2", "rollout.max_tokens=3", "trainer.max_steps=-4"]
    ended = call(tmp_path, "ppo", "experiment=quickstart/ppo", "output_dir=out", *wrong)
    lines = refused(ended).splitlines()
    assert lines[0] == "error: 3 problems in the configuration:"
    assert len(lines) == 4
    for start in ("algorithm.kl_ceof = 0.2: unknown key. Did you mean 'kl_coef'?", "rollout.max_tokens = 3: unknown"):
        assert any(start in line for line in lines)
    assert any("trainer.max_steps = -4: must be greater than 0" in line for line in lines)
    assert "it/s" not in ended.out


def too_many_devices() -> int:
    return 2 * (os.cpu_count() or 1) + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=no_rows.jsonl"], "no_rows.jsonl: no such file (looked from {folder})"),
        pytest.param(
            ["model.path=./no_model", "model.architecture=null", "model.tokenizer=null"],
            "model path './no_model' does not exist",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [f"trainer.devices={too_many_devices()}"],
            f"devices={too_many_devices()} CPU processes for ",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["no data", "no model", "too many devices"],
)
def test_what_cannot_run_is_refused_before_training(
    overrides: Sequence[str], message: str, made: Path, tmp_path: Path
) -> None:
    few = FEW_STEPS["sft"]
    ended = call(tmp_path, "sft", "experiment=quickstart/sft", f"root={made}", "output_dir=out", *few, *overrides)
    assert message.format(folder=tmp_path) in refused(ended)
    assert "it/s" not in ended.out
    assert not (tmp_path / "out" / "model").exists()
