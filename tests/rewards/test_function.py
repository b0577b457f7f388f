from __future__ import annotations

import contextvars
import decimal
import threading
import time
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


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a hanging function waits for; opened in the end, so that no test leaves a thread behind."""
    event = threading.Event()
    yield event
    event.set()


def test_a_function_that_hangs_is_given_up_and_named(gate: threading.Event) -> None:
    def stuck(prompts: list[str], responses: list[str]) -> list[float]:
        gate.wait(30)
        return [0.0, 0.0]

    began = time.monotonic()
    message = r"reward '.*stuck' has not ended after 0.2 seconds, for 2 samples, from sample 0 .*: make it faster"
    with pytest.raises(RewardError, match=message):
        RewardFunction(stuck, timeout_seconds=0.2)(PROMPTS, RESPONSES)
    assert time.monotonic() - began < 2


def test_the_search_for_a_sample_to_blame_is_within_the_same_time(gate: threading.Event) -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if len(responses) > 1:
            raise ValueError("only one at a time")
        gate.wait(30)
        return [0.0]

    message = "raised ValueError: only one at a time, for 2 samples together; time was up before each had been tried"
    with pytest.raises(RewardError, match=message):
        RewardFunction(score, timeout_seconds=0.3)(PROMPTS, RESPONSES)


def test_a_timeout_of_the_functions_own_is_no_timeout_of_ours() -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        raise TimeoutError("the judge sleeps")

    with pytest.raises(RewardError, match="raised TimeoutError: the judge sleeps, for sample 0"):
        RewardFunction(score, timeout_seconds=5.0)(PROMPTS, RESPONSES)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_order_to_stop_passes_through(stop: type[BaseException]) -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        raise stop

    with pytest.raises(stop):
        RewardFunction(score)(PROMPTS, RESPONSES)


def test_the_keyboard_interrupts_the_wait(gate: threading.Event) -> None:
    import _thread

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        _thread.interrupt_main()
        gate.wait(30)
        return [0.0, 0.0]

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        RewardFunction(score, timeout_seconds=30.0)(PROMPTS, RESPONSES)
    assert time.monotonic() - began < 10


NOTE = contextvars.ContextVar("NOTE", default="unset")


def surroundings(prompts: list[str], responses: list[str]) -> list[float]:
    """What a function may find different in another thread, put down in `SEEN`."""
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    SEEN.append(
        {
            "note": NOTE.get(),
            "decimal places": decimal.getcontext().prec,
            "numpy": np.geterr()["over"],
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "default dtype": torch.get_default_dtype(),
            "default device": torch.get_default_device(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "product": (product.dtype, product.device),
            "threads": torch.get_num_threads(),
            "draw": torch.rand(()).item() if product.device.type == "cpu" else None,
        }
    )
    return [0.0] * len(responses)


SEEN: list[dict[str, Any]] = []


@pytest.mark.parametrize(
    "setting",
    [
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", torch.bfloat16),
        partial(torch.device, "meta"),
        partial(np.errstate, over="raise"),
        partial(decimal.localcontext, prec=7),
    ],
    ids=["grad", "no grad", "inference", "autocast", "device", "numpy", "decimal"],
)
def test_a_function_finds_in_its_thread_what_the_caller_has(setting: Any) -> None:
    SEEN.clear()
    NOTE.set("set by the caller")
    for timeout in (None, 60.0):
        torch.manual_seed(0)
        with setting():
            scores = RewardFunction(surroundings, timeout)(PROMPTS, RESPONSES)
            assert scores.device.type == "cpu"
    assert SEEN[0] == SEEN[1]
    assert SEEN[1]["note"] == "set by the caller"


def test_without_a_limit_the_function_runs_in_the_callers_thread() -> None:
    threads = []

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0] * len(responses)

    RewardFunction(score, timeout_seconds=None)(PROMPTS, RESPONSES)
    RewardFunction(score)(PROMPTS, RESPONSES)
    assert threads[0] is threading.main_thread()
    assert threads[1].daemon


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_time_limit_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="reward '.*' *: timeout_seconds is .*: must be above 0 and at most"):
        RewardFunction(lambda prompts, responses: [], timeout_seconds=seconds)


class Unreadable(list[float]):
    def __iter__(self) -> Iterator[float]:
        raise OSError("the file is gone")

    def __repr__(self) -> str:
        raise OSError("the file is gone")


def test_an_answer_that_fails_when_it_is_read_is_refused() -> None:
    message = r"returned an object without a readable form \(Unreadable\), and reading it raised OSError: the file"
    with pytest.raises(RewardError, match=message):
        returning(Unreadable([1.0, 2.0]))(PROMPTS, RESPONSES)
    with pytest.raises(RewardError, match=r"without a readable form \(int\) for sample 1 .*: return a finite number"):
        returning([1, 10**5000])(PROMPTS, RESPONSES)
