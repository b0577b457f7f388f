"""Advantages within groups, and returns, against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_hybrid.rl import discounted_returns, group_advantages

SCORES = torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0, 7.0], dtype=torch.float64)
GROUP = torch.tensor([4, 9, 4, 9, 4, 9])  # groups {1, 3, 4} and {5, 2, 7}, interleaved


def test_grpo_divides_by_the_unbiased_deviation_of_the_group() -> None:
    means, variances = (8 / 3, 14 / 3), (7 / 3, 19 / 3)
    expected = [
        (score - means[g]) / (math.sqrt(variances[g]) + 1e-6)
        for score, g in zip(SCORES.tolist(), (0, 1, 0, 1, 0, 1), strict=True)
    ]
    assert group_advantages(SCORES, GROUP).tolist() == pytest.approx(expected, rel=1e-12)


def test_dr_grpo_subtracts_the_mean_only() -> None:
    expected = [1 - 8 / 3, 5 - 14 / 3, 3 - 8 / 3, 2 - 14 / 3, 4 - 8 / 3, 7 - 14 / 3]
    assert group_advantages(SCORES, GROUP, kind="dr_grpo").tolist() == pytest.approx(expected, rel=1e-12)


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    expected = [1 - 3.5, 5 - 4.5, 3 - 2.5, 2 - 6.0, 4 - 2.0, 7 - 3.5]
    assert group_advantages(SCORES, GROUP, kind="rloo").tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_one_has_nothing_to_be_compared_with(kind: str) -> None:
    assert group_advantages(torch.tensor([3.7, 1.0]), torch.tensor([0, 1]), kind).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("score", [0.1, -1e6 / 3, 1e-30])
def test_equal_scores_give_exactly_nothing_however_their_mean_is_rounded(kind: str, score: float) -> None:
    scores = torch.full((7,), score)
    assert group_advantages(scores, torch.zeros(7, dtype=torch.long), kind).tolist() == [0.0] * 7


def test_half_precision_scores_are_compared_in_float32() -> None:
    scores = torch.tensor([100.0, 101.0, 102.0], dtype=torch.bfloat16)
    advantages = group_advantages(scores, torch.zeros(3, dtype=torch.long), "dr_grpo")
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [pytest.approx(-1.0), 0.0, pytest.approx(1.0)]


def test_an_unknown_kind_and_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'ppo', allowed are grpo, dr_grpo, rloo"):
        group_advantages(SCORES, GROUP, "ppo")
    with pytest.raises(ValueError, match=r"scores has shape \[6\] and group \[5\], allowed is \[batch\]"):
        group_advantages(SCORES, GROUP[:5])


def test_returns_discount_by_the_valid_tokens_in_between() -> None:
    rewards = torch.tensor([[1.0, math.nan, 2.0, 4.0], [3.0, 1.0, math.nan, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    expected = [[1 + 0.5 * (2 + 0.5 * 4), 0.0, 2 + 0.5 * 4, 4.0], [3.5, 1.0, 0.0, 0.0]]
    assert discounted_returns(rewards, mask, 0.5).tolist() == expected


def test_without_a_discount_a_return_is_the_sum_that_is_left() -> None:
    rewards = torch.arange(5.0)[None]
    assert discounted_returns(rewards, torch.ones(1, 5, dtype=torch.bool), 1.0).tolist() == [[10.0, 10, 9, 7, 4]]
