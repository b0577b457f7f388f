"""Columns that a reward asks for: the data is looked at before training, and each batch has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid import PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.data import PromptDataModule
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.rollout import RolloutBackend
from tests.helpers import quiet_trainer, tiny_policy

PROMPT = "mia visits the market ."


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(folder: Path) -> list[str]:
    """Right answers in the one, none in the other."""
    asked = write(folder / "sums.jsonl", [{"prompt": PROMPT, "answer": str(n)} for n in range(4)])
    return [asked, write(folder / "chats.jsonl", [{"prompt": PROMPT, "answr": "no"} for _ in range(4)])]


def right(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    return [float(response == gold) for response, gold in zip(responses, answer, strict=True)]


class Unused(RolloutBackend):
    """A rollout backend that nobody may get to."""

    def generate(self, *arguments: Any, **named: Any) -> Any:
        raise AssertionError("there was a rollout")


def module() -> PPOModule:
    ppo = PPOModule(tiny_policy(), right, PPOConfig(), RolloutConfig(max_new_tokens=4), build_tokenizer())
    ppo.backend = Unused()
    return ppo


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["path", "validation_path"])
def test_a_column_that_one_file_lacks_is_refused_before_training(where: str, streaming: bool, tmp_path: Path) -> None:
    sums, chats = files(tmp_path)
    paths: dict[str, Any] = {"path": [sums, chats]} if where == "path" else {"path": sums, "validation_path": chats}
    data = PromptDataModule(**paths, batch_size=2, schema="keys", streaming=streaming)
    message = (
        r"reward 'right' asks for the column 'answer', which .*chats.jsonl does not have: columns are 'answr'; did"
    )
    with pytest.raises(ConfigError, match=message):
        quiet_trainer("hybrid_deepspeed", max_steps=1).fit(module(), datamodule=data)


def train_on_two_ranks(*paths: str) -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    data = PromptDataModule([*paths], batch_size=2, schema="keys")
    try:
        quiet_trainer("hybrid_deepspeed", devices=2, max_steps=1).fit(module(), datamodule=data)
    except ConfigError as error:
        print("refused:", error)


@pytest.mark.slow
def test_it_is_refused_on_every_rank(run_ranks: Any, tmp_path: Path) -> None:
    for output in run_ranks(train_on_two_ranks, 2, *files(tmp_path)):
        assert "refused: reward 'right' asks for the column 'answer', which" in output


@pytest.mark.parametrize("streaming", [False, True])
def test_every_batch_has_the_columns_of_all_rows(streaming: bool, tmp_path: Path) -> None:
    rows = [{"prompt": PROMPT, "answer": "5"}, {"prompt": PROMPT}, {"prompt": PROMPT, "level": 1}]
    path = write(tmp_path / "rows.jsonl", rows)
    data = PromptDataModule(path, tokenizer=build_tokenizer(), batch_size=1, schema="keys", streaming=streaming)
    batches = list(data.train_dataloader())
    assert [set(batch["fields"]) for batch in batches] == [{"answer", "level"}] * 3
    assert sorted(str(batch["fields"]["answer"][0]) for batch in batches) == ["5", "None", "None"]
    assert data.columns == {path: ["answer", "level"]}
