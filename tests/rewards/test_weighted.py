from __future__ import annotations

import pytest

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards import GSM8KReward, Reward, RewardFunction, WeightedRewards

FIELDS = {"answer": ["3", "4"]}


def lengths(prompts: list[str], responses: list[str]) -> list[int]:
    return [len(response) for response in responses]


def terms(**weights: float) -> WeightedRewards:
    rewards: dict[str, Reward] = {"length": RewardFunction(lengths), "right": GSM8KReward()}
    return WeightedRewards({name: (weights[name], reward) for name, reward in rewards.items()})


def test_the_score_is_the_weighted_sum_and_each_term_is_there_by_itself() -> None:
    reward = terms(length=-0.25, right=2.0)
    scores = reward(["", ""], ["is 3", "x5"], FIELDS)
    assert scores.tolist() == [2.0 - 0.25 * 4, 0.0 - 0.25 * 2]
    assert {name: values.tolist() for name, values in reward.last_terms.items()} == {
        "length": [4.0, 2.0],
        "right": [1.0, 0.0],
    }


def test_figures_have_the_same_names_before_the_first_call_as_after_it() -> None:
    """Ranks that log them must name the same ones."""
    reward = terms(length=1.0, right=1.0)
    before = list(reward.figures)
    reward(["", ""], ["is 3", "x5"], FIELDS)
    assert list(reward.figures) == before == ["length", "right", "right/unverified"]
    assert reward.figures["right/unverified"].tolist() == [0.0, 0.0]


def test_a_term_of_weight_0_is_computed_and_does_not_count() -> None:
    reward = terms(length=0.0, right=1.0)
    assert reward(["", ""], ["is 3", "x5"], FIELDS).tolist() == [1.0, 0.0]
    assert reward.figures["length"].tolist() == [4.0, 2.0]


def test_errors_name_the_term() -> None:
    with pytest.raises(RewardError, match="term 'right': reward 'gsm8k' asks for the column 'answer'"):
        terms(length=1.0, right=1.0)(["", ""], ["a", "b"])


def test_a_sum_that_float32_cannot_hold_is_refused() -> None:
    huge = RewardFunction(lambda prompts, responses: [3e38] * len(responses))
    with pytest.raises(RewardError, match="the weighted sum of sample 0 is inf: terms .*'b': 3"):
        WeightedRewards({"a": (1.0, huge), "b": (1.0, huge)})([""], [""])


@pytest.mark.parametrize("weights", [{}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": float("nan")}])
def test_weights_without_effect_or_meaning_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(
        ConfigError, match="the weights of the reward's terms are .*: give finite ones, not all of them"
    ):
        WeightedRewards({name: (weight, RewardFunction(lengths)) for name, weight in weights.items()})
