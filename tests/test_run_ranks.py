"""The fixture that runs code on real ranks: what it returns, and how it fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
from torch import distributed


def add_ranks(word: str) -> None:
    distributed.init_process_group("gloo")
    total = torch.tensor(distributed.get_rank() + 1)
    distributed.all_reduce(total)
    print(word, total.item())
    distributed.destroy_process_group()


def break_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one broke")
    time.sleep(60)


def test_ranks_talk_to_each_other_and_their_output_comes_back(run_ranks: Callable[..., list[str]]) -> None:
    assert run_ranks(add_ranks, 2, "sum") == ["sum 3\n", "sum 3\n"]


def test_one_failing_rank_ends_the_others_and_is_shown(run_ranks: Callable[..., list[str]]) -> None:
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="rank one broke"):
        run_ranks(break_on_rank_one, 2)
    assert time.monotonic() - start < 40


def test_ranks_that_hang_are_ended(run_ranks: Callable[..., list[str]]) -> None:
    with pytest.raises(pytest.fail.Exception, match="more than 1 s"):
        run_ranks(break_on_rank_one, 1, timeout=1)
