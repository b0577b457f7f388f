from __future__ import annotations

import json

import lightning as L
import pytest
import torch

from lightning_hybrid.callbacks import SampleLog
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.rollout import Rollout


class Writer(L.LightningModule):
    """Keeps the rollout and scores of its batch, as PPOModule does."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.tokenizer = build_tokenizer()

    def training_step(self, batch, batch_idx):
        self.last_rollout = make_rollout(self.tokenizer)
        self.raw_scores = torch.tensor([1.5, -0.25, 0.0]) + batch_idx
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_rollout(tokenizer):
    """Three responses, padded on both sides, the first two ended by EOS."""
    eos = [tokenizer.eos_token_id]
    rows = [("mia sees the", "soup .", eos), ("tom leaves the", "farm .", eos), ("ada", "enters the farm", [])]
    ids = [(encode(tokenizer, prompt), encode(tokenizer, response) + end) for prompt, response, end in rows]
    before, after = (max(len(row[side]) for row in ids) for side in (0, 1))
    tokens, prompt_mask = torch.zeros(3, before + after).long(), torch.zeros(3, before + after).bool()
    response_mask = prompt_mask.clone()
    for row, (prompt, response) in enumerate(ids):
        begin, end = before - len(prompt), before + len(response)
        tokens[row, begin:end] = torch.tensor(prompt + response)
        prompt_mask[row, begin:before], response_mask[row, before:end] = True, True
    zeros = torch.zeros(tokens.shape)
    return Rollout(tokens, prompt_mask, response_mask, zeros, zeros, ("eos", "eos", "length"))


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fit(module, callback, batches=5, epochs=1):
    rows = torch.utils.data.DataLoader(torch.ones(batches, 1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, rows)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_first_rows_are_written_as_text_with_their_scores(tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    fit(Writer(), SampleLog(path, rows=2), batches=1)
    assert [{**line, "response": line["response"].strip()} for line in lines(path)] == [
        {"step": 1, "prompt": "mia sees the", "response": "soup .", "score": 1.5},
        {"step": 1, "prompt": "tom leaves the", "response": "farm .", "score": -0.25},
    ]


def test_prompt_and_response_together_are_the_text_of_both(tmp_path):
    fit(Writer(), SampleLog(tmp_path / "samples.jsonl"), batches=1)
    texts = [line["prompt"] + line["response"] for line in lines(tmp_path / "samples.jsonl")]
    assert texts == ["mia sees the soup .", "tom leaves the farm .", "ada enters the farm"]  # fewer rows than asked for


def test_entries_come_at_the_first_step_and_regularly_after_it_across_epochs(tmp_path):
    path = tmp_path / "samples.jsonl"
    fit(Writer(), SampleLog(path, every=3, rows=1), batches=4, epochs=2)
    assert [line["step"] for line in lines(path)] == [1, 4, 7]


def test_a_later_run_begins_anew(tmp_path):
    path = tmp_path / "samples.jsonl"
    for _ in range(2):
        fit(Writer(), SampleLog(path, rows=1), batches=1)
    assert [line["step"] for line in lines(path)] == [1]


def test_a_module_that_samples_nothing_is_named(tmp_path):
    class Silent(Writer):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

    with pytest.raises(ConfigError, match="Silent keeps none in last_rollout: use it with PPOModule"):
        fit(Silent(), SampleLog(tmp_path / "samples.jsonl"))
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"rows": 0}])
def test_numbers_below_one_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"every >= 1 and rows >= 1, got every=\d+ and rows=\d+"):
        SampleLog(tmp_path / "samples.jsonl", **wrong)
