from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from lightning_hybrid.callbacks.speed import TokenSpeed


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def batch(*lengths):
    width = max(lengths)
    return {
        "input_ids": torch.ones(len(lengths), width),
        "attention_mask": torch.arange(width) < torch.tensor(lengths)[:, None],
    }


def test_padding_is_not_counted_and_ranks_are(clock):
    speed = TokenSpeed(ranks=2)
    clock[0] += 2.0
    speed.add(None, batch(3, 5))
    assert speed.per_second() == pytest.approx(8 * 2 / 2.0)


def test_pairs_are_counted_in_both_texts(clock):
    speed = TokenSpeed()
    clock[0] += 1.0
    speed.add(None, {"chosen": batch(3), "rejected": batch(4), "margin": torch.ones(1)})
    assert speed.per_second() == pytest.approx(7.0)


def test_what_was_sampled_counts_rather_than_the_prompts(clock):
    module = SimpleNamespace(last_rollout=SimpleNamespace(response_mask=torch.ones(4, 6).bool()))
    speed = TokenSpeed()
    clock[0] += 3.0
    speed.add(module, batch(9))
    assert speed.per_second() == pytest.approx(24 / 3.0)


def test_only_the_last_twenty_batches_count(clock):
    speed = TokenSpeed()
    for seconds in [100.0] * 5 + [1.0] * 20:
        clock[0] += seconds
        speed.add(None, batch(10))
    assert speed.per_second() == pytest.approx(10.0)


def test_batches_without_masks_have_no_speed(clock):
    speed = TokenSpeed()
    clock[0] += 1.0
    speed.add(None, torch.ones(3))
    speed.add(None, {"x": torch.ones(3)})
    assert speed.per_second() is None
