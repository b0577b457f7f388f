"""What a user's function may ask for, and how it may be written."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards import RewardFunction, check_fields

PROMPTS = ["1 + 1 = ", "1 + 2 = ", "2 + 2 = "]
RESPONSES = ["2", "4", "4"]
FIELDS = {"answer": ["2", "3", "4"], "level": [1, 2, 3]}


def test_a_function_is_given_the_columns_that_its_parameters_name() -> None:
    def right(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
        return [float(response == gold) for response, gold in zip(responses, answer, strict=True)]

    reward = RewardFunction(right)
    assert reward.needed_fields == {"answer"}
    assert reward(PROMPTS, RESPONSES, FIELDS).tolist() == [1.0, 0.0, 1.0]


def test_a_parameter_with_a_default_is_left_at_it_where_there_is_no_such_column() -> None:
    def score(prompts: list[str], responses: list[str], level: Any = None) -> list[float]:
        return [0.0] * 3 if level is None else level

    assert RewardFunction(score).needed_fields == set()
    assert RewardFunction(score)(PROMPTS, RESPONSES).tolist() == [0.0, 0.0, 0.0]
    assert RewardFunction(score)(PROMPTS, RESPONSES, FIELDS).tolist() == [1.0, 2.0, 3.0]


def test_a_function_with_keyword_arguments_is_given_all_columns() -> None:
    seen: list[Any] = []

    def score(prompts: list[str], responses: list[str], **fields: Any) -> list[float]:
        seen.append(fields)
        return [0.0] * len(responses)

    RewardFunction(score)(PROMPTS, RESPONSES, FIELDS)
    assert seen == [FIELDS]


def test_columns_are_the_functions_own_to_change() -> None:
    def greedy(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
        answer.clear()
        return [0.0] * 3

    RewardFunction(greedy)(PROMPTS, RESPONSES, FIELDS)
    assert FIELDS["answer"] == ["2", "3", "4"]


def asks_for_answr(prompts: list[str], responses: list[str], answr: list[str]) -> list[float]:
    return [0.0] * len(responses)


def test_a_missing_column_is_named_with_those_that_there_are() -> None:
    message = r"reward 'asks_for_answr' asks for the column 'answr', which .*: columns are 'answer', 'level'; did you"
    with pytest.raises(RewardError, match=message):
        RewardFunction(asks_for_answr)(PROMPTS, RESPONSES, FIELDS)
    with pytest.raises(RewardError, match="columns are none beside the prompt$"):
        RewardFunction(asks_for_answr)(PROMPTS, RESPONSES)
    with pytest.raises(
        ConfigError, match=r"'answr', which rows.jsonl does not have: columns are 'answer'; did you mean"
    ):
        check_fields(RewardFunction(asks_for_answr), ["answer"], "rows.jsonl")
    check_fields(RewardFunction(asks_for_answr), ["answr"])


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(RewardError, match="column 'answr' has 1 values for 3 responses"):
        RewardFunction(asks_for_answr)(PROMPTS, RESPONSES, {"answr": ["2"]})


def test_a_function_without_room_for_prompts_and_responses_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes responses: its first two parameters must be prompts and responses"):
        RewardFunction(lambda responses: [0.0])


def test_the_sample_that_a_function_with_columns_raises_for_is_named() -> None:
    def score(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
        return [1 / (int(gold) - 3) for gold in answer]

    with pytest.raises(RewardError, match=r"raised ZeroDivisionError: .*, for sample 1 \(prompt '1 \+ 2 = '"):
        RewardFunction(score)(PROMPTS, RESPONSES, FIELDS)


# ---- one sample at a time ----------------------------------------------------------------------------------------


def test_a_function_of_one_prompt_and_one_response_is_called_for_each() -> None:
    def score(prompt: str, response: str, answer: str) -> float:
        return float(response == answer) if prompt else 0.0

    assert RewardFunction(score)(PROMPTS, RESPONSES, FIELDS).tolist() == [1.0, 0.0, 1.0]


def test_it_is_called_once_for_each_also_when_it_raises() -> None:
    calls: list[str] = []

    def score(prompt: str, response: str) -> float:
        calls.append(prompt)
        if prompt.startswith("1 + 2"):
            raise KeyError("no judge")
        return 0.0

    with pytest.raises(RewardError, match=r"raised KeyError: 'no judge', for sample 1 \(prompt '1 \+ 2 = '") as caught:
        RewardFunction(score)(PROMPTS, RESPONSES)
    assert isinstance(caught.value.__cause__, KeyError)
    assert calls == PROMPTS[:2]


# ---- async -------------------------------------------------------------------------------------------------------


class Judge:
    """A callable object."""

    async def __call__(self, prompts: list[str], responses: list[str]) -> list[int]:
        await asyncio.sleep(0)
        return [len(response) for response in responses]


async def batched(prompts: list[str], responses: list[str]) -> list[int]:
    await asyncio.sleep(0.001)
    return [len(response) for response in responses]


async def scaled(factor: int, prompts: list[str], responses: list[str]) -> list[int]:
    return [factor * len(response) for response in responses]


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("function", [batched, Judge(), partial(scaled, 1)], ids=["function", "object", "partial"])
def test_async_functions_are_awaited(function: Any, timeout: float | None) -> None:
    assert RewardFunction(function, timeout)(PROMPTS, ["", "a", "ab"]).tolist() == [0.0, 1.0, 2.0]


def test_async_functions_are_awaited_inside_a_running_loop_such_as_a_notebooks() -> None:
    async def cell() -> list[float]:
        return RewardFunction(batched, None)(PROMPTS, RESPONSES).tolist()

    assert asyncio.run(cell()) == [1.0, 1.0, 1.0]


def test_one_event_loop_serves_all_calls_so_that_a_client_can_stay_open() -> None:
    loops: list[Any] = []

    async def score(prompts: list[str], responses: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(responses)

    reward = RewardFunction(score)
    reward(PROMPTS, RESPONSES)
    reward(PROMPTS, RESPONSES)
    assert loops[0] is loops[1]


def test_async_samples_wait_together_but_no_more_than_32_of_them() -> None:
    waiting: list[int] = [0]
    most: list[int] = [0]

    async def score(prompt: str, response: str, level: int) -> float:
        waiting[0] += 1
        most[0] = max(most[0], waiting[0])
        await asyncio.sleep(0.05)
        waiting[0] -= 1
        return float(level)

    began = time.monotonic()
    scores = RewardFunction(score)(["p"] * 64, ["r"] * 64, {"level": list(range(64))})
    assert scores.tolist() == [float(level) for level in range(64)]
    assert most[0] == 32
    assert time.monotonic() - began < 1.5  # one after the other: 3.2


def test_an_async_sample_that_raises_is_named_and_ends_the_others() -> None:
    cancelled: list[str] = []

    async def score(prompt: str, response: str) -> float:
        if prompt.startswith("1 + 2"):
            raise TimeoutError("judge is away")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(prompt)
            raise
        return 0.0

    with pytest.raises(RewardError, match=r"raised TimeoutError: judge is away, for sample 1 \(prompt '1 \+ 2 = '"):
        RewardFunction(score)(PROMPTS, RESPONSES)
    assert sorted(cancelled) == [PROMPTS[0], PROMPTS[2]]


def test_an_async_function_that_hangs_is_cancelled_and_the_next_call_works() -> None:
    ended = threading.Event()
    hang = [True]

    async def score(prompts: list[str], responses: list[str]) -> list[float]:
        try:
            if hang[0]:
                await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.set()
            raise
        return [1.0] * len(responses)

    reward = RewardFunction(score, timeout_seconds=0.2)
    with pytest.raises(RewardError, match="has not ended after 0.2 seconds, for 3 samples"):
        reward(PROMPTS, RESPONSES)
    assert ended.wait(5)
    hang[0] = False
    assert reward(PROMPTS, RESPONSES).tolist() == [1.0, 1.0, 1.0]


def test_an_async_function_is_cancelled_when_its_caller_is_interrupted() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def score(prompts: list[str], responses: list[str]) -> list[float]:
        begun.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1.0] * len(responses)

    def interrupt() -> None:
        begun.wait(10)
        time.sleep(0.3)  # until the caller waits
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # as from the keyboard: it wakes the main thread

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        RewardFunction(score, timeout_seconds=20.0)(PROMPTS, RESPONSES)
    assert cancelled.wait(5)


def test_an_async_function_finds_the_callers_torch_settings() -> None:
    async def score(prompts: list[str], responses: list[str]) -> list[float]:
        assert not torch.is_grad_enabled()
        return [0.0] * len(responses)

    with torch.no_grad():
        RewardFunction(score)(PROMPTS, RESPONSES)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_order_to_stop_passes_through_the_event_loop(stop: type[BaseException]) -> None:
    async def score(prompts: list[str], responses: list[str]) -> list[float]:
        raise stop

    began = time.monotonic()
    with pytest.raises(stop):
        RewardFunction(score, timeout_seconds=20.0)(PROMPTS, RESPONSES)
    assert time.monotonic() - began < 5
