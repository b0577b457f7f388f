"""`recipe_main`: composition, sweeps and errors, as a recipe sees them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_hybrid.config import PPORun
from lightning_hybrid.config.run import compose_run, recipe_main
from lightning_hybrid.errors import ConfigError, DataError
from lightning_hybrid.paths import conf_dir

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"]


def words(value: object) -> str | None:
    """What a list of arguments is called in the name of a test."""
    return " ".join(value) if isinstance(value, list) else None


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


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["--cfg", "job", "--package", "trainer"], "accelerator: auto\n"),
        (["-c", "hydra"], "name: ppo\n"),
        (["trainer=cpu", "--cfg", "job", "algorithm.kl_coef=0.25", "-p", "algorithm"], "kl_coef: 0.25\n"),
        (["--cfg", "all", "--resolve"], "dir: outputs/ppo\n"),
        (["--cfg", "hydra", "--resolve"], "dir: outputs/ppo\n"),
        (["--cfg", "hydra", "--resolve", "-p", "run"], "# @package hydra.run\ndir: outputs/ppo\n"),
        (["--info", "defaults", "algorithm=grpo"], "| algorithm/grpo "),
        (["--info", "defaults-tree", "algorithm=grpo"], "algorithm: grpo"),
        (["--info", "config", "algorithm.kl_coef=0.25"], "kl_coef: 0.25\n"),
        (["--info", "plugins"], "OptunaSweeper"),
        (["--info", "searchpath"], str(conf_dir())),
        (["--info", "all"], "Config search path"),
        (["--hydra-help"], "hydra/sweeper: basic, optuna"),
        (["-sc", "install=bash"], "complete -o nospace -o default -F _lightning_hybrid_completion"),
    ],
    ids=words,
)
def test_hydra_answers_in_place_of_the_recipe(asked: list[str], expected: str, tmp_path: Path) -> None:
    """In a process of its own: Hydra sets up logging for some of the answers."""
    answer = ask(ROOT / "lightning_hybrid_cli.py", "ppo", *asked, folder=tmp_path)
    assert expected in answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("asked", [["--cfg", "job", "algorithm=grpo"], ["--help"], ["--info", "defaults"]], ids=words)
def test_recipe_as_a_script_answers_like_the_command(asked: list[str], tmp_path: Path) -> None:
    script = ask(ROOT / "recipes" / "ppo.py", *asked, folder=tmp_path)
    assert script == ask(ROOT / "lightning_hybrid_cli.py", "ppo", *asked, folder=tmp_path)


def ask(*command: str | Path, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
        (["--resolve"], "--resolve flag can only be used in conjunction with --cfg or --help"),
        (["algorithm=grop"], "algorithm=grop: no such choice. Did you mean 'grpo'? There are: cispo, dapo"),
        (["--help", "algorithm=grop"], "algorithm=grop: no such choice. Did you mean 'grpo'?"),
        (["-m", "algorithm=ppo,gropo"], "algorithm=gropo: no such choice. Did you mean 'grpo'?"),
        (["experiment=grpo"], "experiment=grpo: no such choice. Did you mean 'movie_sentiment/grpo'?"),
        (["adapter@model.critic_adapter=lorra"], "adapter=lorra: no such choice. Did you mean 'lora'?"),
        (["-m", "hydra/launcher=jobli"], "hydra/launcher=jobli: no such choice. Did you mean 'joblib'?"),
        (["-m", "hydra/sweeper=optun"], "hydra/sweeper=optun: no such choice. Did you mean 'optuna'?"),
    ],
    ids=words,
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        recipe(*NEEDED, *arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert recipe.runs == []


@pytest.mark.parametrize(
    ("choice", "package"),
    [
        ("hydra/launcher=joblib", "hydra-joblib-launcher"),
        ("hydra/launcher=submitit_slurm", "hydra-submitit-launcher"),
        ("hydra/sweeper=optuna", "optuna"),
    ],
)
def test_plugin_that_is_not_installed_is_named_with_its_command(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], choice: str, package: str
) -> None:
    missing = {"hydra_plugins.hydra_joblib_launcher", "hydra_plugins.hydra_submitit_launcher", "optuna"}
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(SystemExit, match="2"):
        recipe("-m", *NEEDED, choice)
    advice = f'{choice} needs the package {package}: pip install "lightning-hybrid[sweep]"'
    assert capsys.readouterr().err == f"error: {advice}\n"


def test_composing_in_python_refuses_a_choice_alike() -> None:
    with pytest.raises(ConfigError, match="algorithm=grop: no such choice. Did you mean 'grpo'?"):
        compose_run("ppo", PPORun, [*NEEDED, "algorithm=grop"])


def test_choices_from_a_folder_of_the_users_are_left_to_hydra(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine" / "algorithm").mkdir(parents=True)
    (tmp_path / "mine" / "algorithm" / "own.yaml").write_text("defaults: [ppo]\nkl_coef: 0.125\n")
    recipe(*NEEDED, "--config-dir", str(tmp_path / "mine"), "algorithm=own")
    assert recipe.runs[0].algorithm.kl_coef == 0.125


def test_help_lists_groups_and_settings(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        recipe("--help")
    text = capsys.readouterr().out
    assert "lightning-hybrid ppo" in text
    assert "train a policy against a reward" in text
    assert "trainer=auto\n  auto  Whatever hardware is there; one device.\n  cpu   On the CPU" in text
    assert "movie_sentiment/grpo " in text
    assert "movie_sentiment/sft" not in text  # another recipe's
    assert "kl_coef: 0.05" in text
