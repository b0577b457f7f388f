from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import multiprocessing

from lightning_hybrid.engines.agreement import agree, of_all_ranks, on_every_rank
from lightning_hybrid.errors import RewardError
from lightning_hybrid.rewards import RewardFunction


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response) for response in responses]


def rank_main(rank: int, folder: str, rounds: list[list[list[str]]]) -> None:
    """In each round, scores this rank's responses, and writes down how that ended; then meets the other rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    for index, responses in enumerate(rounds):
        Path(folder, f"round{index}-rank{rank}").write_text(outcome(responses[rank]))
    dist.barrier()
    dist.destroy_process_group()


def outcome(responses: list[str]) -> str:
    try:
        scores = on_every_rank(lambda: RewardFunction(score)(["p"] * len(responses), responses))
    except RewardError as error:
        return f"{error}\ncause: {type(error.__cause__).__name__}"
    return f"scores {scores.tolist()}"


ONE_FAILS, NONE_FAILS = [["1.5"], ["2.5", "oops"]], [["1.5"], ["2.5", "3.5"]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Of each round, what each rank wrote down."""
    folder = tmp_path_factory.mktemp("rounds")
    multiprocessing.spawn(rank_main, args=(str(folder), [ONE_FAILS, NONE_FAILS]), nprocs=2)
    return [[(folder / f"round{index}-rank{rank}").read_text() for rank in range(2)] for index in range(2)]


def test_one_failing_rank_raises_on_every_rank_and_none_hangs(outcomes: list[list[str]]) -> None:
    first, second = outcomes[0]
    for outcome in (first, second):
        assert "the reward failed on 1 of 2 ranks:\n  rank 1: reward 'score' raised ValueError" in outcome
        assert "sample 1 (prompt 'p', response 'oops')" in outcome
    assert first.endswith("cause: NoneType")
    assert second.endswith("cause: RewardError")


def test_ranks_that_are_fine_get_their_own_scores(outcomes: list[list[str]]) -> None:
    assert outcomes[1] == ["scores [1.5]", "scores [2.5, 3.5]"]


def test_without_a_process_group_results_pass_and_errors_are_raised() -> None:
    assert agree([1.0]) == [1.0]
    assert of_all_ranks("mine") == ["mine"]
    with pytest.raises(RewardError, match="MemoryError: all gone") as caught:
        agree(MemoryError("all gone"))
    assert isinstance(caught.value.__cause__, MemoryError)
