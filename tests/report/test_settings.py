"""What the configuration says about things to look at reaches the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_hybrid.assemble import make_trainer
from lightning_hybrid.callbacks import (
    HFExport,
    MetricsEvents,
    MetricsFile,
    PhaseProgressBar,
    RichPhaseBar,
    SampleLog,
    StopOnSignal,
)
from lightning_hybrid.config import PPORun, SFTRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.report.callback import RunReport

NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "trainer=cpu"]


def trainer_of(folder: Path, *overrides: str, callbacks=()):
    run = compose_run("ppo", PPORun, [*NEEDED, "reward.path=a-model", f"output_dir={folder}", *overrides])
    return make_trainer(run, "ppo", HFExport(folder / "model", "actor", build_tokenizer()), callbacks)


@pytest.mark.parametrize(
    ("logger", "kinds"), [("csv", [MetricsFile]), ("tensorboard", [MetricsFile, MetricsEvents]), ("none", [])]
)
def test_the_table_that_reports_read_is_written_beside_any_other_log(tmp_path, logger, kinds):
    assert [type(each) for each in trainer_of(tmp_path, f"logger={logger}").loggers] == kinds


@pytest.mark.parametrize(("name", "kind"), [("tqdm", PhaseProgressBar), ("rich", RichPhaseBar)])
def test_the_bar_is_the_one_that_was_asked_for(tmp_path, name, kind):
    assert type(trainer_of(tmp_path, f"callbacks.progress={name}").progress_bar_callback) is kind


def test_every_run_reports_before_it_stops(tmp_path):
    names = [type(callback) for callback in trainer_of(tmp_path).callbacks]
    assert names.index(RunReport) < names.index(StopOnSignal)
    assert names.index(RunReport) > names.index(HFExport)


def test_samples_are_printed_as_often_as_configured(tmp_path):
    samples = SampleLog(tmp_path / "samples.jsonl")
    trainer_of(tmp_path, "callbacks.print_samples=5", callbacks=[samples])
    assert samples.print_every == 5


def test_a_recipe_that_samples_nothing_refuses_to_print_samples():
    with pytest.raises(
        ConfigError, match=r"callbacks\.print_samples = 5: this recipe samples no responses: leave it out"
    ):
        compose_run("sft", SFTRun, [*NEEDED, "callbacks.print_samples=5"])


def test_the_password_in_an_address_does_not_reach_the_report(tmp_path):
    trainer = trainer_of(tmp_path, "reward.path=null", "reward.url=https://me:secret@judge.example/score")
    (report,) = [callback for callback in trainer.callbacks if isinstance(callback, RunReport)]
    assert report.config["reward"]["url"] == "https://…@judge.example/score"
    assert trainer.strategy.run_config["reward"]["url"] == "https://…@judge.example/score"  # as checkpoints keep it
