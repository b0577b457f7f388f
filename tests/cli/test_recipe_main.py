"""`recipe_main`: composition, sweeps and errors, as a recipe sees them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lightning_hybrid.config import PPORun
from lightning_hybrid.config.run import compose_run, recipe_main
from lightning_hybrid.errors import DataError

NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"]


class Recipe:
    """A job that remembers what it was called with, and can be called from a command line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.runs: list[PPORun] = []
        self.arguments: list[list[str]] = []
        self._monkeypatch = monkeypatch
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str) -> None:
        self._monkeypatch.setattr(sys, "argv", ["ppo.py", *arguments])
        recipe_main("ppo", PPORun, self.job)

    def job(self, run: PPORun) -> None:
        self.runs.append(run)
        self.arguments.append(sys.argv[1:])
        assert "LOCAL_RANK" not in os.environ
        os.environ["LOCAL_RANK"] = "0"  # as Lightning's launcher leaves behind


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    return Recipe(monkeypatch, tmp_path)


def test_job_gets_the_validated_configuration(recipe: Recipe, tmp_path: Path) -> None:
    recipe(*NEEDED, "algorithm.kl_coef=0.2", "trainer=cpu")
    (run,) = recipe.runs
    assert (run.algorithm.kl_coef, run.trainer.accelerator, run.output_dir) == (0.2, "cpu", "outputs/ppo")
    assert (tmp_path / "outputs/ppo/.hydra/config.yaml").is_file()


def test_experiment_is_chosen_by_folder_and_stage(recipe: Recipe) -> None:
    recipe("experiment=movie_sentiment/ppo")
    assert recipe.runs[0].data.first_words == 4


def test_sweep_runs_each_value_in_a_folder_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    recipe("-m", *NEEDED, "algorithm.kl_coef=0.01,0.05", "rollout.top_k=0,5")
    swept = [(run.algorithm.kl_coef, run.rollout.top_k) for run in recipe.runs]
    assert swept == [(0.01, 0), (0.01, 5), (0.05, 0), (0.05, 5)]
    folders = [Path(run.output_dir) for run in recipe.runs]
    assert len(set(folders)) == 4
    assert {folder.parent.parent for folder in folders} == {tmp_path / "outputs/ppo/multirun"}


def test_ranks_started_within_a_sweep_run_the_same_job_only(recipe: Recipe) -> None:
    """Lightning starts further ranks with the command line of the first, which must hold one job and its folder."""
    recipe("-m", *NEEDED, "algorithm.kl_coef=0.01,0.05")
    for run, arguments in zip(recipe.runs, recipe.arguments, strict=True):
        assert "-m" not in arguments
        assert compose_run("ppo", PPORun, arguments) == run


def test_unknown_key_is_reported_with_everything_else(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        recipe("algorithm.kl_ceof=0.2", "trainer.max_steps=-1", *NEEDED[:2])
    message = capsys.readouterr().err
    assert message.startswith("error: 3 problems in the configuration:\n")
    assert "Did you mean 'kl_coef'?" in message
    assert recipe.runs == []


def test_error_of_the_job_is_its_message_and_code_2(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(run: PPORun) -> None:
        raise DataError(f"{run.data.path}:3: no key 'prompt'")

    monkeypatch.setattr(recipe, "job", refuse)
    with pytest.raises(SystemExit, match="2"):
        recipe(*NEEDED)
    assert capsys.readouterr().err == "error: rows.jsonl:3: no key 'prompt'\n"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        recipe(*NEEDED)
    assert capsys.readouterr().err == "error (rank 1): rows.jsonl:3: no key 'prompt'\n"


def test_full_error_shows_where_it_was_raised(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: PPORun) -> None:
        raise DataError("rows.jsonl:3: no key 'prompt'")

    monkeypatch.setattr(recipe, "job", refuse)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(DataError, match="no key 'prompt'"):
        recipe(*NEEDED)


def test_cfg_shows_the_configuration_and_runs_nothing(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe("--cfg", "job", "algorithm.kl_coef=0.2")
    assert "  kl_coef: 0.2\n" in capsys.readouterr().out
    assert recipe.runs == []


def test_help_lists_groups_and_settings(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        recipe("--help")
    text = capsys.readouterr().out
    assert "lightning-hybrid ppo" in text
    assert "trainer: auto, cpu, gpu" in text
    assert "kl_coef: 0.05" in text
