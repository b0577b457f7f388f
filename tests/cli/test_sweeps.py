"""Sweeps: each run in a folder of its own, one summary, failures that end one run only, values chosen by Optuna."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from pathlib import Path

import pytest

from lightning_hybrid.config import PPORun
from lightning_hybrid.config.run import compose_run, recipe_main
from lightning_hybrid.errors import RewardError

NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"]
EXPERIMENTS = [f"movie_sentiment/{name}" for name in ("grpo", "rloo", "reinforce_plus_plus", "ppo")]


class Sweep:
    """A recipe that trains nothing and logs what training would: a score that is best at kl_coef=0.1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.runs: list[PPORun] = []
        self.folder = folder
        self._monkeypatch = monkeypatch
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str) -> None:
        self._monkeypatch.setattr(sys, "argv", ["ppo.py", "-m", *arguments])
        recipe_main("ppo", PPORun, self.job)

    def job(self, run: PPORun) -> None:
        self.runs.append(run)
        coefficient = run.algorithm.kl_coef
        if coefficient > 0.5:
            raise RewardError("the judge is away")
        if coefficient < 0.0001:
            raise ZeroDivisionError("a defect")
        score = 1 - abs(coefficient - 0.1)
        rows = [f"{score * step / 4},,{step},0" for step in range(5)] + [f",{2 * score},4,0"]
        metrics = Path(run.output_dir) / "metrics.csv"
        metrics.write_text("\n".join(["reward/score,val/score,step,epoch", *rows, ""]))

    @property
    def place(self) -> Path:
        (folder,) = self.folder.glob("outputs/**/multirun/*")
        return folder

    def table(self) -> list[dict[str, str]]:
        with (self.place / "summary.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sweep:
    return Sweep(monkeypatch, tmp_path)


def test_four_experiments_are_one_sweep_with_one_summary(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(f"experiment={','.join(EXPERIMENTS)}")
    folders = [Path(run.output_dir) for run in sweep.runs]
    assert folders == [sweep.place / str(number) for number in range(4)]
    assert [row["experiment"] for row in sorted(sweep.table(), key=lambda row: row["run"])] == EXPERIMENTS
    for folder in folders:
        assert f"output_dir: {folder}\n" in (folder / ".hydra" / "config.yaml").read_text()
    assert {path.name for path in sweep.place.iterdir()} == {"0", "1", "2", "3"} | {
        "multirun.yaml",
        "summary.csv",
        "summary.png",
    }
    assert {path.name for path in (sweep.folder / "outputs").iterdir()} == {"ppo"}  # none at the experiments' own
    printed = capsys.readouterr().out
    assert re.search(r"^0 +grpo +", printed, re.MULTILINE)
    assert re.search(r"^2 +reinforce_plus_plus +", printed, re.MULTILINE)


def test_table_has_what_differs_and_the_best_run_first(sweep: Sweep) -> None:
    sweep(*NEEDED, "algorithm.kl_coef=0.01,0.1,0.3", "data.batch_size=64", "sweep.metric=reward/score")
    rows = sweep.table()
    assert [row["run"] for row in rows] == ["1", "0", "2"]
    assert [row["algorithm.kl_coef"] for row in rows] == ["0.1", "0.01", "0.3"]
    assert [float(row["reward/score"]) for row in rows] == pytest.approx([1.0, 0.91, 0.8])
    assert "data.batch_size" not in rows[0]
    assert {row["status"] for row in rows} == {"done"}


def test_direction_turns_the_order_round(sweep: Sweep) -> None:
    sweep(*NEEDED, "algorithm.kl_coef=0.01,0.1,0.3", "sweep.direction=minimize")
    assert [row["run"] for row in sweep.table()] == ["2", "0", "1"]


def test_a_run_that_fails_is_in_the_summary_and_ends_no_other(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(*NEEDED, "algorithm.kl_coef=0.9,0.00001,-1,0.1")
    rows = {row["algorithm.kl_coef"]: row for row in sweep.table()}
    assert [rows[value]["status"] for value in ("0.9", "1e-05", "-1", "0.1")] == ["failed", "failed", "failed", "done"]
    assert rows["0.9"]["error"] == "the judge is away"
    assert rows["1e-05"]["error"] == "ZeroDivisionError: a defect"
    assert "algorithm.kl_coef = -1: must be greater than or equal to 0" in rows["-1"]["error"]
    error = capsys.readouterr().err
    assert error.endswith("error: 3 of 4 runs of the sweep failed\n")
    assert error.count("Traceback") == 1  # of the defect; the others are errors of ours, and say what to do


def test_every_run_failing_is_a_summary_too(sweep: Sweep) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(*NEEDED, "algorithm.kl_coef=0.8,0.9")
    assert [row["status"] for row in sweep.table()] == ["failed", "failed"]
    assert not (sweep.place / "summary.png").exists()


def test_metric_that_is_not_logged_is_an_error_with_those_that_are(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(*NEEDED, "algorithm.kl_coef=0.1,0.2", "sweep.metric=val/scores")
    assert "sweep.metric = val/scores: not logged; there are reward/score, val/score" in capsys.readouterr().err


def test_run_that_is_killed_stays_unfinished(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: PPORun) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(*NEEDED, "algorithm.kl_coef=0.1,0.2")
    record = json.loads((sweep.place / "0" / "job.json").read_text())
    assert record["status"] == "unfinished"
    assert record["overrides"][-1] == "++algorithm.kl_coef=0.1"
    assert not (sweep.place / "1").exists()


def test_folder_with_odd_characters(sweep: Sweep) -> None:
    sweep(*NEEDED, "algorithm.kl_coef=0.1,0.2", "output_dir='outputs/it\\'s, a=b'")
    assert [Path(run.output_dir).parent for run in sweep.runs] == [sweep.place, sweep.place]
    assert "it's, a=b" in str(sweep.place)


def test_ranks_of_a_job_are_started_with_its_own_recipe_and_folder(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning asks `__main__`, the command line and Hydra; in a worker of joblib they are those of the worker."""
    commands = []

    def job(run: PPORun) -> None:
        from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd

        command, _ = _hydra_subprocess_cmd(local_rank=1)
        commands.append((run, list(command)))

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", sys.__spec__)
    monkeypatch.setattr(sweep, "job", job)
    sweep(*NEEDED, "algorithm.kl_coef=0.1,0.2", "output_dir='it\\'s'")
    for run, command in commands:
        assert command[:2] == [sys.executable, str(sweep.folder / "ppo.py")]
        assert f'hydra.run.dir="{run.output_dir}"' in command
        assert compose_run("ppo", PPORun, [text for text in command[2:] if not text.startswith("hydra.")]) == run
    assert sys.modules["__main__"].__spec__ is sys.__spec__
    assert sys.argv[0] == "ppo.py"


def test_ranks_of_a_job_find_configurations_where_it_found_them(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def job(run: PPORun) -> None:
        commands.append((run, sys.argv))

    for name, steps in (("mine", 7), ("more", 8)):
        (sweep.folder / name / "trainer").mkdir(parents=True)
        text = f"defaults: [cpu, _self_]\nnum_sanity_val_steps: {steps}\n"
        (sweep.folder / name / "trainer" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(sweep, "job", job)
    search = f"hydra.searchpath=[file://{sweep.folder}/more]"
    sweep("--config-dir", "mine", search, *NEEDED, "trainer=mine,more")
    assert [run.trainer.num_sanity_val_steps for run, _ in commands] == [7, 8]
    again: list[PPORun] = []
    for _, (_, *arguments) in commands:
        monkeypatch.setattr(sys, "argv", ["ppo.py", *arguments, "hydra.output_subdir=null"])
        recipe_main("ppo", PPORun, again.append)
    assert again == [run for run, _ in commands]


def test_no_job_leaves_its_environment_to_the_next(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def job(run: PPORun) -> None:
        seen.append(os.environ.get("LEFT_BEHIND"))
        os.environ["LEFT_BEHIND"] = "1"
        raise RewardError("also when it fails")

    monkeypatch.setattr(sweep, "job", job)
    with pytest.raises(SystemExit, match="2"):
        sweep(*NEEDED, "algorithm.kl_coef=0.1,0.2")
    assert seen == [None, None]


OPTUNA = ["hydra/sweeper=optuna", "sweep.metric=reward/score"]


@pytest.mark.slow
def test_optuna_comes_closer_than_chance(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(*NEEDED, *OPTUNA, "hydra.sweeper.n_trials=25", "algorithm.kl_coef=interval(0.01,0.4)")
    tried = [run.algorithm.kl_coef for run in sweep.runs]
    assert len(tried) == 25
    assert all(0.01 <= value <= 0.4 for value in tried)
    late = [abs(value - 0.1) for value in tried[10:]]  # the first ten are drawn at random
    assert sum(late) / len(late) < 0.06  # a value drawn at random is 0.126 away on average
    best = min(tried, key=lambda value: abs(value - 0.1))
    assert f"best of 25 runs: algorithm.kl_coef={best!r} with reward/score=" in capsys.readouterr().out
    assert sweep.table()[0]["algorithm.kl_coef"] == repr(best)


def test_optuna_searches_choices_whole_numbers_and_orders_of_magnitude(sweep: Sweep) -> None:
    space = ["algorithm.kl_coef=tag(log,interval(0.001,0.4))", "algorithm=ppo,grpo", "algorithm.epochs=range(1,8,3)"]
    sweep(*NEEDED, *OPTUNA, "hydra.sweeper.n_trials=12", *space, "rollout.max_new_tokens=int(interval(4,6))")
    assert {run.algorithm.name for run in sweep.runs} == {"ppo", "grpo"}
    assert {run.algorithm.epochs for run in sweep.runs} <= {1, 4, 7}
    assert {run.rollout.max_new_tokens for run in sweep.runs} <= {4, 5, 6}
    assert sum(run.algorithm.kl_coef < 0.02 for run in sweep.runs) >= 3  # one in twenty if it were not logarithmic


def test_optuna_goes_on_after_a_run_that_failed(sweep: Sweep) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(*NEEDED, *OPTUNA, "hydra.sweeper.n_trials=8", "algorithm.kl_coef=interval(0.1,0.6)")
    statuses = [row["status"] for row in sweep.table()]
    assert len(statuses) == 8
    assert {"done", "failed"} == set(statuses)


def test_optuna_ends_when_nothing_can_come_of_it(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(*NEEDED, *OPTUNA, "algorithm.kl_coef=interval(0.6,0.7)")
    assert len(sweep.runs) == 3
    assert "none of the first 3 runs came to a value: the search ends" in capsys.readouterr().err


def test_optuna_goes_on_with_a_study(sweep: Sweep) -> None:
    kept = [f"hydra.sweeper.storage=sqlite:///{sweep.folder}/study.db", "hydra.sweeper.study_name=kl"]
    for number in ("first", "second"):
        few = ["hydra.sweeper.n_trials=3", "algorithm.kl_coef=interval(0.01,0.4)", f"hydra.sweep.dir={number}"]
        sweep(*NEEDED, *OPTUNA, *kept, *few)
    import optuna

    study = optuna.load_study(study_name="kl", storage=f"sqlite:///{sweep.folder}/study.db")
    tried = [run.algorithm.kl_coef for run in sweep.runs]
    assert [trial.params["++algorithm.kl_coef"] for trial in study.trials] == tried
    assert len(set(tried)) == 6  # the second draws what the first did not


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algorithm.kl_coef=interval(0,1)"], "hydra/sweeper=optuna needs to know what it is after: give sweep.metric"),
        (["sweep.metric=reward/score"], "hydra/sweeper=optuna has nothing to search: give a key several values"),
        (["sweep.metric=a", "data.batch_size=1,2", "hydra.sweeper.n_trials=0"], "n_trials = 0: must be greater than 0"),
        (["sweep.metric=a", "data.batch_size=1,2", "sweep.direction=up"], "direction = 'up': must be 'maximize'"),
        (["sweep.metric=a", "data.batch_size=1,2", "hydra.sweeper.study_name=s"], "study_name: needs storage"),
    ],
)
def test_optuna_refuses_before_any_run(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(*NEEDED, "hydra/sweeper=optuna", *arguments)
    assert message in capsys.readouterr().err
    assert sweep.runs == []
