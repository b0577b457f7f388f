from __future__ import annotations

import importlib.util
import json

import lightning as L
import pytest
import torch

from lightning_hybrid.callbacks import MetricsEvents, PhaseProgressBar, SampleLog, make_wandb
from lightning_hybrid.callbacks.sample_tables import columns_of, markdown, terminal_table
from lightning_hybrid.errors import ConfigError
from tests.callbacks.test_samples import Writer

ROWS = [
    {"prompt": "a short one", "response": " and what\nfollows", "score": 1.5},
    {"prompt": "long " * 40, "response": "response " * 40, "score": -12.25},
    {"prompt": "日本語のプロンプト" * 5, "response": "é\033[31mred\a", "score": float("nan")},
]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    lines = terminal_table(ROWS, 1200, width).splitlines()
    assert lines[0] == "samples after step 1,200"
    assert len(lines) == 2 + len(ROWS)
    assert max(map(columns_of, lines)) <= width


def test_texts_are_cut_with_a_mark_and_stay_on_their_line():
    lines = terminal_table(ROWS, 1, 80).splitlines()
    assert "and what⏎follows" in lines[2]
    assert lines[3].count("…") == 2
    assert "    1.500" in lines[2]


def test_nothing_in_a_text_reaches_the_terminal_as_a_command():
    table = terminal_table(ROWS, 1, 200)
    assert "\033" not in table
    assert "\a" not in table
    assert "·[31mred·" in table


def test_responses_begin_in_one_column():
    responses = ("response", " and", "response response")
    lines = terminal_table(ROWS[:2], 1, 80).splitlines()[1:]
    begins = [columns_of(line[: line.index(text)]) for line, text in zip(lines, responses, strict=True)]
    assert len(set(begins)) == 1


def test_texts_cannot_leave_their_cells():
    table = markdown([{"prompt": "a | b\nc", "response": "<b>*x*</b>", "score": 1.0}])
    assert table.splitlines()[2] == r"| a \| b⏎c | \<b\>\*x\*\</b\> | 1 |"


def fit(*callbacks, logger=False, batches=5):
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=any(isinstance(callback, PhaseProgressBar) for callback in callbacks),
        enable_model_summary=False,
    )
    trainer.fit(Writer(), torch.utils.data.DataLoader(torch.ones(batches, 1)))


@pytest.mark.parametrize("bar", [(), (PhaseProgressBar("ppo"),)])
def test_tables_are_printed_as_often_as_asked_for(tmp_path, capsys, bar):
    fit(*bar, SampleLog(tmp_path / "samples.jsonl", every=100, print_every=2))
    out = capsys.readouterr().out
    assert [step for step in range(1, 6) if f"samples after step {step}" in out] == [1, 3, 5]
    assert "mia sees the" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert set(steps) == {1}


def test_nothing_is_printed_unless_asked_for(tmp_path, capsys):
    fit(SampleLog(tmp_path / "samples.jsonl", every=1))
    assert "samples after" not in capsys.readouterr().out


def test_tensorboard_has_the_samples_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(SampleLog(tmp_path / "samples.jsonl", every=3), logger=MetricsEvents(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 3]
    assert "mia sees the" in texts[0].tensor_proto.string_val[0].decode()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is an extra")
@pytest.mark.filterwarnings("ignore")  # the package's own
@pytest.mark.slow
def test_wandb_has_the_samples_as_tables_without_a_network(tmp_path):
    logger = make_wandb(tmp_path, "tests", offline=True, resuming=False, config={"seed": 0})
    fit(SampleLog(tmp_path / "samples.jsonl", every=3), logger=logger)
    logger.experiment.finish()
    tables = [
        json.loads(path.read_text()) for path in (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")
    ]
    assert len(tables) == 2
    assert tables[0]["columns"] == ["prompt", "response", "score"]
    assert tables[0]["data"][0][0] == "mia sees the"
    identity = (tmp_path / "wandb-run-id").read_text().strip()
    assert logger.version == identity
    assert make_wandb(tmp_path, "tests", offline=True, resuming=True).version == identity
    assert make_wandb(tmp_path, "tests", offline=True, resuming=False).version != identity


def test_a_missing_wandb_is_named_with_its_extra(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(
        ConfigError, match=r'logger=wandb needs the package wandb: pip install "lightning-hybrid\[wandb\]"'
    ):
        make_wandb(tmp_path, "tests", offline=True, resuming=False)
    assert not (tmp_path / "wandb-run-id").exists()
