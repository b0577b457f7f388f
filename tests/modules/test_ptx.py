"""The PTX loss: texts of one's own, drawn in an order that neither ranks nor resuming change."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_hybrid import InstructionDataModule, PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.config import PTXConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError, DataError
from lightning_hybrid.models import Policy
from lightning_hybrid.modules.ptx import PTX
from tests.data.training import rows_of
from tests.helpers import tiny_policy
from tests.models.test_policy import family
from tests.modules.test_ppo import History, prompts, quiet_trainer

TEXTS = ["mia visits the market .", "tom leaves the farm .", "ada sees the museum .", "tom visits the farm .", "mia ."]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def data(path: str | list[str], batch_size: int = 2, **arguments: Any) -> InstructionDataModule:
    return InstructionDataModule(path, prompt_key=None, response_key="text", batch_size=batch_size, **arguments)


def drawn(
    path: str | list[str], steps: int, ranks: int, batch_size: int, **arguments: Any
) -> list[list[tuple[int, ...]]]:
    """The texts of each step, over all ranks."""
    dealt = []
    for rank in range(ranks):
        texts = data(path, batch_size, tokenizer=build_tokenizer(), **arguments)
        texts.setup()  # before any rank is to agree with others, of which there are none
        ptx = PTX(texts)
        ptx.setup(trained(ranks, rank))
        dealt.append([rows_of(ptx.draw(step)) for step in range(steps)])
    return [[tuple(row) for rows in zip(*step, strict=True) for row in rows] for step in zip(*dealt, strict=True)]


def trained(ranks: int = 1, rank: int = 0, policy: Any = None) -> Any:
    """What the texts ask of the module whose policy is trained."""
    trainer = SimpleNamespace(world_size=ranks)
    actor = policy or tiny_policy()
    return SimpleNamespace(trainer=trainer, global_rank=rank, actor=actor, tokenizer=build_tokenizer())


def test_every_text_is_drawn_once_each_time_around(texts: str) -> None:
    steps = drawn(texts, steps=10, ranks=1, batch_size=1)
    counts = Counter(row for step in steps for row in step)
    assert set(counts.values()) == {2}
    assert len(counts) == len(TEXTS)
    assert [step[0] for step in steps[:5]] != [step[0] for step in steps[5:]]


@pytest.mark.parametrize("arguments", [{}, {"balance": True}, {"streaming": True}])
def test_two_ranks_draw_together_what_one_rank_draws(texts: str, arguments: dict[str, Any]) -> None:
    two, one = (drawn(texts, 6, ranks, 4 // ranks, **arguments) for ranks in (2, 1))
    assert two == one
    assert {row for step in one[:2] for row in step} == {row for step in one[2:4] for row in step}  # twice around
    assert len({row for step in one[:2] for row in step}) == len(TEXTS)


def test_the_texts_come_in_the_order_of_their_own_seed(texts: str) -> None:
    assert drawn(texts, 5, 1, 1, seed=1) == drawn(texts, 5, 1, 1, seed=1) != drawn(texts, 5, 1, 1, seed=2)


def test_sources_are_drawn_with_their_shares(texts: str, tmp_path: Path) -> None:
    rare = tmp_path / "rare.jsonl"
    rare.write_text('{"text": "tom ."}\n' * 5)
    (row,) = {row for step in drawn(str(rare), 1, 1, 5) for row in step}
    steps = drawn([texts, str(rare)], 100, 1, 10, mix=[0.9, 0.1])
    # 1,000 draws: the count of the second has a standard deviation of sqrt(1000 · 0.9 · 0.1) = 9.5
    assert abs(sum(drawn_row == row for step in steps for drawn_row in step) - 100) < 40


def test_balanced_batches_hold_texts_of_like_length_each_time_around(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "the " * (n + 1)}) + "\n" for n in range(18)))
    spreads = [max(map(len, step)) - min(map(len, step)) for step in drawn(str(path), 20, 1, 4, balance=True)]
    assert [spread for number, spread in enumerate(spreads) if number % 5 < 4] == [3] * 16


def test_texts_may_be_as_long_as_the_policy_has_positions_whatever_limits_its_prompts(texts: str) -> None:
    ptx = PTX(data(texts))
    module = trained()
    module.max_positions = 4  # of prompts and responses, which must fit into a cache
    ptx.setup(module)
    assert len(ptx.data.train_dataloader().dataset) == len(TEXTS)
    short = PTX(data(texts))
    short.setup(trained(policy=tiny_policy(max_position_embeddings=4)))
    assert len(short.data.train_dataloader().dataset) == 1


def test_packed_texts_are_refused_for_a_policy_that_would_let_one_see_another(texts: str) -> None:
    policy = Policy(family("bloom"))
    with pytest.raises(ConfigError, match="the texts of a packed row would see each other: set packing=false"):
        PTX(data(texts, packing=True, max_length=64)).setup(trained(policy=policy))
    packed = PTX(data(texts, packing=True))
    packed.setup(trained())
    assert packed.draw(0)["sequence"].max() == len(TEXTS)


@pytest.mark.parametrize("setting", [{"validation_fraction": 0.1}, {"validation_path": "b"}, {"num_workers": 1}])
def test_settings_that_have_no_effect_are_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}=.* has no effect on the texts of the PTX loss: leave it out"):
        PTX(data("a.jsonl", **setting))
    with pytest.raises(ConfigError, match=f"{name} = .*: has no effect on the texts of the PTX loss: leave it out"):
        PTXConfig(path="a.jsonl", **setting)


def test_shares_without_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match="mix = .*: needs one share for each path"):
        PTXConfig(mix=[1.0])


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


def train_on_ranks(folder: str, differ: bool) -> None:
    """Entry point of a rank: one iteration with the texts of its own file, or of one that all share."""
    rank = int(os.environ["RANK"])
    module = PPOModule(
        tiny_policy(),
        lambda prompts, responses: [0.0] * len(responses),
        PPOConfig(ptx_coef=1.0, micro_batch_size=16, epochs=1, minibatch_size=32),
        RolloutConfig(max_new_tokens=4),
        build_tokenizer(),
        ptx=data(f"{folder}/texts{rank if differ else ''}.jsonl", batch_size=2),
    )
    history = History()
    try:
        quiet_trainer("hybrid_deepspeed", devices=2, max_steps=1, callbacks=[history]).fit(module, prompts())
    except DataError as error:
        print(f"refused: {error}")
    else:
        print(json.dumps(history.rows[-1]["policy/ptx_loss"]))


@pytest.mark.slow
def test_ranks_train_on_the_same_texts_or_not_at_all(texts: str, run_ranks: Any, tmp_path: Path) -> None:
    one, two = (json.loads(output.splitlines()[-1]) for output in run_ranks(train_on_ranks, 2, str(tmp_path), False))
    assert one == two > 0
    for rank in (0, 1):
        (tmp_path / f"texts{rank}.jsonl").write_text(json.dumps({"text": TEXTS[rank]}) + "\n")
    for output in run_ranks(train_on_ranks, 2, str(tmp_path), True):
        assert "refused: the ranks have read different data" in output
