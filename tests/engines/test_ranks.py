"""The same result however the work is spread: over ranks, ZeRO stages and micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import two_ranks

FIGURES = ("policy/loss", "value/loss", "policy/kl", "policy/clip_fraction", "policy/ratio_max", "reward/score")


@pytest.fixture(scope="module")
def one_rank() -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """What every other spread of the work must come to."""
    return two_ranks.update(stage=1, world_size=1)


@pytest.mark.parametrize("stages", [(2, 3), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_two_ranks_of_four_prompts_update_like_one_rank_of_eight_at_every_zero_stage(
    run_ranks: Any, tmp_path: Path, stages: tuple[int, ...], one_rank: Any
) -> None:
    run_ranks(two_ranks.save_updates, 2, str(tmp_path), 2, stages, timeout=180)
    one_actor, one_critic, one_figures = one_rank
    for stage in stages:
        two = torch.load(tmp_path / f"2-{stage}.pt", weights_only=True)
        figures = json.loads((tmp_path / f"2-{stage}.json").read_text())
        torch.testing.assert_close(
            two["actor"], one_actor, rtol=1e-5, atol=5e-6, msg=lambda m, s=stage: f"stage {s}: {m}"
        )
        torch.testing.assert_close(two["critic"], one_critic, rtol=1e-5, atol=5e-6)
        for name in FIGURES:
            assert figures[name] == pytest.approx(one_figures[name], rel=1e-4, abs=1e-6), (stage, name)


GROUP_FIGURES = ("policy/loss", "policy/clip_fraction", "policy/ratio_max", "reward/score", "rollout/samples_drawn")


@pytest.mark.parametrize(
    ("names", "stage"),
    [
        (("grpo", "reinforce_plus_plus_baseline"), 3),
        pytest.param(("dr_grpo", "rloo", "reinforce_plus_plus", "gspo", "cispo"), 2, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_update_an_algorithm_without_a_critic_like_one(
    run_ranks: Any, tmp_path: Path, names: tuple[str, ...], stage: int
) -> None:
    run_ranks(two_ranks.save_group_updates, 2, str(tmp_path), 2, list(names), stage, timeout=240)
    for name in names:
        two = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        weights, figures = two_ranks.group_update(name, stage=1, world_size=1)
        torch.testing.assert_close(two["weights"], weights, rtol=1e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
        for figure in GROUP_FIGURES:
            assert two["figures"][figure] == pytest.approx(figures[figure], rel=1e-4, abs=1e-6), (name, figure)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_updates_alike_on_one_rank(stage: int, one_rank: Any) -> None:
    actor, critic, _ = two_ranks.update(stage=stage, world_size=1)
    expected_actor, expected_critic, _ = one_rank
    torch.testing.assert_close(actor, expected_actor, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(critic, expected_critic, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    "aggregation",
    ["token_mean", *(pytest.param(f"seq_mean_token_{how}", marks=pytest.mark.slow) for how in ("mean", "sum_norm"))],
)
def test_the_micro_batch_size_does_not_change_the_update(aggregation: str) -> None:
    results = [
        two_ranks.update(stage=2, world_size=1, micro_batch_size=size, aggregation=aggregation) for size in (1, 2, 8)
    ]
    for actor, critic, figures in results[1:]:
        torch.testing.assert_close(actor, results[0][0], rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(critic, results[0][1], rtol=1e-5, atol=5e-6)
        for name in FIGURES:
            assert figures[name] == pytest.approx(results[0][2][name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("pin", [True, False], ids=["gathered once", "layer by layer"])
def test_ranks_may_stop_generating_at_different_lengths_under_zero_3(run_ranks: object, pin: bool) -> None:
    outputs = run_ranks(two_ranks.generate_ragged, 2, pin)
    assert ["drew 6" in outputs[0], "drew 15" in outputs[1]] == [True, True]


@pytest.mark.slow
def test_two_ranks_sample_the_responses_that_one_rank_samples_and_learn_the_same(
    run_ranks: object, tmp_path: Path
) -> None:
    run_ranks(two_ranks.sample_in_ppo, 2, str(tmp_path), 2)
    said, weights = two_ranks.sampled_in_ppo(1)
    by_rank = [json.loads((tmp_path / f"responses-{rank}.json").read_text()) for rank in range(2)]
    for step in range(2):
        dealt = [by_rank[i % 2][step][i // 2] for i in range(two_ranks.ROWS)]
        assert dealt == said[step]
    torch.testing.assert_close(torch.load(tmp_path / "weights.pt", weights_only=True), weights, rtol=1e-4, atol=1e-5)
