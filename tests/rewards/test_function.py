from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards import RewardFunction

PROMPTS = ["first prompt", "second prompt"]
RESPONSES = ["first response", "second response"]


def returning(answer: Any) -> RewardFunction:
    def score(prompts: list[str], responses: list[str]) -> Any:
        return answer

    return RewardFunction(score)


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2],
        (1.0, 2.0),
        [torch.tensor(1.0), torch.tensor(2)],
        [np.float32(1), np.int64(2)],
        [np.array(1.0), 2],
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        np.array([1.0, 2.0]),
    ],
)
def test_every_kind_of_number_is_accepted(answer: Any) -> None:
    scores = returning(answer)(PROMPTS, RESPONSES)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.0]
    assert not scores.requires_grad


def test_the_function_sees_the_texts_but_cannot_change_the_callers_lists() -> None:
    def greedy(prompts: list[str], responses: list[str]) -> list[int]:
        lengths = [len(response) - len(prompt) for prompt, response in zip(prompts, responses, strict=True)]
        prompts.clear()
        responses.clear()
        return lengths

    prompts = list(PROMPTS)
    assert RewardFunction(greedy)(prompts, RESPONSES).tolist() == [2.0, 2.0]
    assert prompts == PROMPTS


def test_no_samples_give_no_scores() -> None:
    assert returning([])([], []).shape == (0,)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("0.5", r"'0.5' \(str\)"),
        (None, r"None \(NoneType\)"),
        (1 + 2j, r"\(1\+2j\) \(complex\)"),
        (True, r"True \(bool\)"),
        (np.bool_(True), r"True \(bool\)"),
        ([1.0], r"\[1.0\] \(list\)"),
        (torch.tensor([1.0]), r"\[1.0\] \(list\)"),
        (float("nan"), r"nan \(float\)"),
        (torch.tensor(float("-inf")), r"-inf \(float\)"),
        (1e300, r"1e\+300 \(float\)"),
        (10**400, r"10+… \(int\)"),
    ],
)
def test_what_is_not_a_finite_number_is_refused_with_its_sample(value: Any, problem: str) -> None:
    where = r"for sample 1 \(prompt 'second prompt', response 'second response'\)"
    with pytest.raises(RewardError, match=rf"reward '.*score' returned {problem} {where}: return a .*number"):
        returning([1.0, value])(PROMPTS, RESPONSES)


@pytest.mark.parametrize("answer", [None, 1.0, torch.tensor(1.0), "ab", {"a": 1, "b": 2}, {1.0, 2.0}])
def test_what_is_not_a_sequence_is_refused(answer: Any) -> None:
    with pytest.raises(RewardError, match="reward '.*score' returned .*sample 0 .*: return one number per response, 2"):
        returning(answer)(PROMPTS, RESPONSES)


def test_a_generator_is_refused() -> None:
    def stream(prompts: list[str], responses: list[str]) -> Iterator[float]:
        yield from (1.0, 2.0)

    with pytest.raises(RewardError, match=r"\(generator\).*return one number per response, 2 in all"):
        RewardFunction(stream)(PROMPTS, RESPONSES)


def test_too_few_scores_name_the_first_sample_without_one() -> None:
    with pytest.raises(RewardError, match="returned 1 scores, none for sample 1 .*'second response'"):
        returning([1.0])(PROMPTS, RESPONSES)


def test_too_many_scores_are_refused() -> None:
    with pytest.raises(RewardError, match="returned 3 scores: return one number per response, 2 in all"):
        returning(np.ones(3))(PROMPTS, RESPONSES)


def test_a_function_that_raises_names_the_sample_it_raised_for() -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [1 / (len(response) - len("second response")) for response in responses]

    with pytest.raises(RewardError, match="raised ZeroDivisionError: .*, for sample 1 .*'second response'") as caught:
        RewardFunction(score)(PROMPTS, RESPONSES)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_raises_only_for_the_batch_says_so() -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if len(prompts) > 1:
            raise TimeoutError("too much at once")
        return [0.0]

    with pytest.raises(RewardError, match="TimeoutError: too much at once, for 2 samples together but for none alone"):
        RewardFunction(score)(PROMPTS, RESPONSES)


def test_long_texts_are_cut_in_the_message() -> None:
    with pytest.raises(RewardError, match="returned nan") as caught:
        returning([float("nan")])(["p" * 5000], ["r" * 5000])
    assert len(str(caught.value)) < 400


def test_callables_without_a_name_are_named_by_their_type() -> None:
    with pytest.raises(RewardError, match="reward 'partial' returned None"):
        RewardFunction(partial(lambda extra, prompts, responses: None, 1))(PROMPTS, RESPONSES)


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="the reward is 3, which cannot be called"):
        RewardFunction(3)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="was given 2 prompts and 1 responses"):
        returning([1.0])(PROMPTS, ["one"])
