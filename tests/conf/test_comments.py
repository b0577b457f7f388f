"""What a configuration file says about itself, and what help makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_hybrid.config import SweepConfig
from lightning_hybrid.config.command_line import choices_of, purpose
from lightning_hybrid.config.search import OptunaConfig
from lightning_hybrid.config.sweep import USUAL_METRICS
from lightning_hybrid.paths import conf_dir

FILES = sorted(str(path.relative_to(conf_dir())) for path in conf_dir().rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_every_file_begins_with_what_it_is_for(file: str) -> None:
    sentence = purpose(conf_dir() / file)
    assert len(sentence.split()) >= 3, f"conf/{file}: its first comment should say what it is for"
    assert sentence.endswith("."), f"conf/{file}: {sentence!r} is not a sentence"


@pytest.mark.parametrize("file", [file for file in FILES if "/" not in file])
def test_a_recipe_says_first_how_it_is_called(file: str) -> None:
    command = file.removesuffix(".yaml")
    assert purpose(conf_dir() / file).startswith(f"lightning-hybrid {command}: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# One. Two.\n", "One."),
        ("# GRPO (Shao et al. 2024): without a critic. More.\na: 1\n", "GRPO (Shao et al. 2024): without a critic."),
        ("# Stage 3: Dr. GRPO.\n", "Stage 3: Dr. GRPO."),
        ("# @package _global_\n# Two lines of\n# one sentence.\na: 1  # other\n", "Two lines of one sentence."),
        ("# Rows of data.jsonl. Others.\n", "Rows of data.jsonl."),
        ("a: 1  # not about the file\n", ""),
    ],
)
def test_purpose_is_the_first_sentence_of_the_first_comment(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    assert purpose(tmp_path / "file.yaml") == sentence


def test_what_choices_have_in_common_is_no_choice() -> None:
    assert "base/online" not in choices_of("algorithm", conf_dir())
    assert {"movie_sentiment/ppo", "quickstart/ppo"} <= set(choices_of("experiment", conf_dir()))


def test_comments_name_all_that_there_is() -> None:
    for file in FILES:
        for line in (conf_dir() / file).read_text().splitlines():
            if line.startswith("ckpt_path:"):
                assert "last: " in line, file
                assert "best: " in line, file
    said = (conf_dir() / "sweep" / "default.yaml").read_text()
    assert f"{', '.join(USUAL_METRICS[:-1])} or {USUAL_METRICS[-1]}" in said


def test_defaults_of_sweeps_in_yaml_are_those_in_python() -> None:
    ranking = OmegaConf.to_container(OmegaConf.load(conf_dir() / "sweep" / "default.yaml"))
    assert ranking == SweepConfig().model_dump()
    optuna = OmegaConf.to_container(OmegaConf.load(conf_dir() / "hydra" / "sweeper" / "optuna.yaml"))
    assert isinstance(optuna, dict)
    assert optuna.pop("_target_") == "hydra_plugins.lightning_hybrid_optuna_sweeper.OptunaSweeper"
    assert optuna == OptunaConfig().model_dump()
