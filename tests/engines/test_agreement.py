from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from lightning_hybrid.engines.agreement import agree
from lightning_hybrid.errors import RewardError
from lightning_hybrid.rewards import RewardFunction


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response) for response in responses]


def rank_main(rank: int, folder: str, responses: list[list[str]]) -> None:
    """Scores this rank's responses, writes down how that ended, and meets the other rank in one more collective."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    scores: torch.Tensor | RewardError
    try:
        scores = RewardFunction(score)(["p"] * len(responses[rank]), responses[rank])
    except RewardError as error:
        scores = error
    try:
        outcome = f"scores {agree(scores).tolist()}"
    except RewardError as error:
        outcome = f"{error}\ncause: {type(error.__cause__).__name__}"
    dist.barrier()
    dist.destroy_process_group()
    Path(folder, f"rank{rank}").write_text(outcome)


def outcomes(folder: Path, responses: list[list[str]]) -> list[str]:
    multiprocessing.spawn(rank_main, args=(str(folder), responses), nprocs=2)
    return [(folder / f"rank{rank}").read_text() for rank in range(2)]


def test_one_failing_rank_raises_on_every_rank_and_none_hangs(tmp_path: Path) -> None:
    first, second = outcomes(tmp_path, [["1.5"], ["2.5", "oops"]])
    for outcome in (first, second):
        assert "the reward failed on 1 of 2 ranks:\n  rank 1: reward 'score' raised ValueError" in outcome
        assert "sample 1 (prompt 'p', response 'oops')" in outcome
    assert first.endswith("cause: NoneType")
    assert second.endswith("cause: RewardError")


def test_ranks_that_are_fine_get_their_own_scores(tmp_path: Path) -> None:
    assert outcomes(tmp_path, [["1.5"], ["2.5", "3.5"]]) == ["scores [1.5]", "scores [2.5, 3.5]"]


def test_without_a_process_group_results_pass_and_errors_are_raised() -> None:
    assert agree([1.0]) == [1.0]
    with pytest.raises(RewardError, match="MemoryError: all gone") as caught:
        agree(MemoryError("all gone"))
    assert isinstance(caught.value.__cause__, MemoryError)
