"""The recipe `reward` on labelled texts: its accuracy over all pairs, which is that of the exported model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lightning_hybrid.data import write_task
from tests.integration.processes import Ended, run


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A policy to start from, and texts of two kinds."""
    from tests.helpers import tiny_policy

    files = write_task(tmp_path / "task")
    tiny_policy().model.save_pretrained(tmp_path / "policy")
    texts = {1: "the lesson is quiet .", 0: "the lemonade is warm ."}
    lines = [json.dumps({"text": texts[label], "label": label}) for label in (0, 1) * 8]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    assert files.tokenizer == tmp_path / "task" / "tokenizer"
    return tmp_path


def reward(folder: Path, *overrides: str) -> Ended:
    command = [sys.executable, "-m", "lightning_hybrid_cli", "reward", "model.path=policy", "data.path=texts.jsonl"]
    data = ["data.pairing=labels", "data.validation_path=texts.jsonl", "data.batch_size=4", "trainer.max_steps=2"]
    few = ["model.tokenizer=task/tokenizer", "trainer=cpu", "trainer.enable_checkpointing=false", "output_dir=out"]
    return run([*command, *data, *few, *overrides], folder, timeout=90)


@pytest.mark.slow
def test_the_accuracy_is_that_of_the_exported_model_and_none_where_none_is_exported(task: Path) -> None:
    ended = reward(task, "callbacks.export_model=false")
    assert ended.code == 0, ended
    assert not (task / "out" / "model").exists()
    assert not (task / "out" / "accuracy.json").exists()
    ended = reward(task)
    assert ended.code == 0, ended
    assert json.loads((task / "out" / "accuracy.json").read_text())["pairs"] == 64
    assert "of 64 validation pairs in the right order" in ended.out
