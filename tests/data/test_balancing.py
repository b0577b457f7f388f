"""Batches of texts of like length: every text once, the same order from the same seed and epoch, less padding."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule
from lightning_hybrid.data.balancing import LikeLengths, padding_share
from lightning_hybrid.errors import ConfigError
from tests.data.training import train_and_resume

LENGTHS = random.Random(0).choices(range(1, 400), k=1000)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 3))
def test_every_text_comes_once_in_each_epoch(lengths: list[int], size: int, epoch: int) -> None:
    assert sorted(LikeLengths(lengths, size, 0, epoch)) == list(range(len(lengths)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): list(LikeLengths(LENGTHS, 8, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[1, 1] == list(LikeLengths(LENGTHS, 8, 1, lambda: 1))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=100), st.integers(1, 4), st.integers(1, 4))
def test_ranks_get_equal_shares_of_every_batch(lengths: list[int], size: int, ranks: int) -> None:
    shares = [list(LikeLengths(lengths, size, 0, 0, ranks, rank)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(-len(lengths) // ranks)}
    dealt = [index for step in zip(*shares, strict=True) for index in step]
    assert dealt[: len(lengths)] == list(LikeLengths(lengths, size * ranks, 0))


def test_batches_hold_like_lengths_and_come_in_any_order() -> None:
    order = list(LikeLengths(LENGTHS, 8, 0))
    shuffled = random.Random(0).sample(range(1000), 1000)
    assert padding_share(LENGTHS, shuffled, 8) > 0.4
    assert padding_share(LENGTHS, order, 8) < 0.04
    longest = [max(LENGTHS[i] for i in order[begin : begin + 8]) for begin in range(0, 1000, 8)]
    ascending = sum(a < b for a, b in zip(longest, longest[1:], strict=False))
    assert 0.35 < ascending / len(longest) < 0.65


def test_padding_is_counted_over_all_places_of_all_batches() -> None:
    assert padding_share([1, 3, 4], [0, 1, 2], 2) == pytest.approx(2 / 10)


ROWS = [{"prompt": "mia", "response": "the " * n} for n in LENGTHS[:203]]


def widths(module: InstructionDataModule) -> list[int]:
    return [batch["input_ids"].shape[1] for batch in module.train_dataloader()]


def test_a_balanced_module_pads_less_and_loses_nothing(write, tokenizer) -> None:
    name = write("a.jsonl", ROWS)
    modules = [InstructionDataModule(name, tokenizer=tokenizer, balance=balance) for balance in (False, True)]
    plain, balanced = (
        [(int(b["attention_mask"].sum()), b["attention_mask"].numel()) for b in module.train_dataloader()]
        for module in modules
    )
    assert sum(tokens for tokens, _ in plain) == sum(tokens for tokens, _ in balanced)
    assert 1.5 * sum(places for _, places in balanced) < sum(places for _, places in plain)


def test_the_order_of_a_module_is_that_of_its_epoch(write, tokenizer) -> None:
    module = InstructionDataModule(write("a.jsonl", ROWS), tokenizer=tokenizer, balance=True)
    first = widths(module)
    assert widths(module) == first

    class Trainer:
        world_size, global_rank, current_epoch, lightning_module = 1, 0, 1, None

    module.trainer = Trainer()  # type: ignore[assignment]
    assert widths(module) != first


def test_settings_that_decide_the_order_otherwise_are_refused(write) -> None:
    with pytest.raises(ConfigError, match="packing and balance are both set"):
        InstructionDataModule("a.jsonl", packing=True, balance=True)
    with pytest.raises(ConfigError, match="balance needs pairs whose lengths are known"):
        PreferenceDataModule("a.jsonl", pairing="labels", balance=True)
    with pytest.raises(ConfigError, match="balance and mix both decide the order"):
        InstructionDataModule(["a.jsonl", "b.jsonl"], mix=[1, 1], balance=True)


@pytest.mark.slow
def test_ranks_get_batches_of_like_length_and_a_resumed_run_goes_on_in_the_same_order(
    write: Any, run_ranks: Any, tmp_path: Path
) -> None:
    whole = train_and_resume(run_ranks, write("a.jsonl", ROWS[:90]), tmp_path, 16, balance=True)
    assert {epoch for epoch, _ in whole[0]} == {0, 1}  # twelve steps make an epoch
    gaps = [abs(max(map(len, one)) - max(map(len, other))) for (_, one), (_, other) in zip(*whole, strict=True)]
    assert sum(gaps) / len(gaps) < 15  # of lengths up to 400
