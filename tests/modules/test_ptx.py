"""The PTX loss: texts of one's own, drawn in an order that neither ranks nor resuming change."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hybrid import InstructionDataModule, PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.modules.ptx import PTX
from tests.helpers import tiny_policy
from tests.modules.test_ppo import History, prompts, quiet_trainer

TEXTS = ["mia visits the market .", "tom leaves the farm .", "ada sees the museum .", "tom visits the farm .", "mia ."]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def data(path: str, batch_size: int = 2) -> InstructionDataModule:
    return InstructionDataModule(path, prompt_key=None, response_key="text", batch_size=batch_size)


def drawn(path: str, steps: int, ranks: int, batch_size: int) -> list[list[tuple[int, ...]]]:
    """The texts of each step, over all ranks."""
    ptx = PTX(data(path, batch_size), seed=3)
    ptx.setup(build_tokenizer(), 64)
    found = []
    for step in range(steps):
        rows: list[tuple[int, ...]] = []
        for rank in range(ranks):
            module: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=ranks), global_rank=rank)
            batch = ptx._draw(module, step)
            masks = batch["attention_mask"]
            rows += [tuple(ids[mask].tolist()) for ids, mask in zip(batch["input_ids"], masks, strict=True)]
        found.append(sorted(rows))
    return found


def test_every_text_is_drawn_once_each_time_around(texts: str) -> None:
    steps = drawn(texts, steps=10, ranks=1, batch_size=1)
    counts = Counter(row for step in steps for row in step)
    assert set(counts.values()) == {2}
    assert len(counts) == len(TEXTS)
    assert [step[0] for step in steps[:5]] != [step[0] for step in steps[5:]]


def test_two_ranks_draw_together_what_one_rank_draws(texts: str) -> None:
    assert drawn(texts, steps=6, ranks=2, batch_size=2) == drawn(texts, steps=6, ranks=1, batch_size=4)


def test_the_policy_keeps_the_language_of_the_texts(texts: str) -> None:
    module = PPOModule(
        tiny_policy(),
        lambda prompts, responses: [0.0] * len(responses),
        PPOConfig(ptx_coef=1.0, actor_lr=3e-3, micro_batch_size=16, epochs=2, minibatch_size=8),
        RolloutConfig(max_new_tokens=4),
        build_tokenizer(),
        ptx=data(texts, batch_size=5),
    )
    history = History()
    quiet_trainer("hybrid_deepspeed", max_steps=8, callbacks=[history]).fit(module, prompts())
    losses = [row["policy/ptx_loss"] for row in history.rows]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(49.0)).item(), abs=0.5)  # fresh weights know nothing
    assert losses[-1] < losses[0] / 2
