"""Whatever an endpoint or a reward function answers, it is one finite score per response or one error of ours."""

from __future__ import annotations

import array
import collections
import decimal
import fractions
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from lightning_hybrid.rewards import RewardFunction, load_reward_function
from lightning_hybrid.rewards.answers import parse_scores
from lightning_hybrid.rewards.endpoint import seconds_asked
from tests.properties import inputs
from tests.properties.cases import cases, success_or_our_own_error

score_lists = st.lists(st.one_of(st.floats(-9, 9), st.integers(-9, 9), inputs.json_values), max_size=4)
answers = st.one_of(
    st.fixed_dictionaries({"scores": score_lists}),
    st.fixed_dictionaries({"scores": inputs.json_values}, optional={"detail": inputs.json_values}),
    inputs.json_values,
)
answer_bytes = st.builds(
    lambda answer, code: json.dumps(answer).encode(code), answers, st.sampled_from(["utf-8", "utf-16"])
)
deep = st.integers(1, 100_000).map(lambda depth: b'{"scores":' + b"[" * depth)
bodies = st.one_of(answer_bytes, inputs.spoilt(answer_bytes), st.binary(max_size=100), deep)


@cases(st.tuples(bodies, st.integers(0, 4)), few=80, many=2000)
def test_answers_of_endpoints_are_scores_or_refused(case: tuple[bytes, int], folder: Path) -> None:
    body, count = case
    with success_or_our_own_error():
        scores = torch.tensor(parse_scores(body, count), dtype=torch.float32)
        assert scores.shape == (count,)
        assert scores.isfinite().all()


dates = st.datetimes().map(lambda date: date.strftime("%a, %d %b %Y %H:%M:%S ") + "GMT")
asked = st.one_of(
    dates,
    st.text(max_size=30),
    st.integers().map(str),
    inputs.spoilt(dates.map(str.encode)).map(lambda text: text.decode(errors="replace")),
)


@cases(asked, few=30, many=300)
def test_a_pause_that_is_asked_for_is_a_number_of_seconds(header: str, folder: Path) -> None:
    assert 0 <= seconds_asked(header) < math.inf


class Hostile:
    """A sequence that fails in one of the places in which it is looked at."""

    def __init__(self, fails: str) -> None:
        self.fails = fails

    def _do(self, what: str, result: Any) -> Any:
        if what == self.fails:
            raise RuntimeError("no")
        return result

    def __len__(self) -> int:
        return self._do("len", 2)

    def __iter__(self) -> Iterator[Any]:
        return self._do("iter", iter([1.0, 2.0, 3.0] if self.fails == "lies" else [1.0, self]))

    def __contains__(self, item: object) -> bool:
        return self._do("contains", False)

    def __repr__(self) -> str:
        return self._do("repr", "hostile \ud800")

    def __float__(self) -> float:
        return self._do("float", 1.0)


class OddNumber(float):
    def __ge__(self, other: object) -> bool:
        raise ArithmeticError("incomparable")

    __le__ = __ge__

    def __repr__(self) -> str:
        raise ArithmeticError("unspeakable")


class OddType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return False


TORCH_TYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int8,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.float8_e5m2,
]
NUMPY_TYPES = ["f2", "f4", "f8", "g", "i1", "u8", "?", "c8", "O", "S3", "U3", "M8[s]", "m8[s]", "V4"]
shapes = st.sampled_from([(), (1,), (2,), (2,), (2,), (3,), (2, 1), (0,), (2, 0)])
tensors = st.builds(lambda shape, kind: torch.zeros(shape).to(kind), shapes, st.sampled_from(TORCH_TYPES))
other_tensors = st.sampled_from(
    [
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)]),
        torch.nn.Parameter(torch.ones(2)),
        torch.full((2,), float("inf")),
        torch.ones(2, dtype=torch.complex64).conj(),
    ]
)
arrays = st.builds(lambda shape, kind: np.zeros(shape, dtype=kind), shapes, st.sampled_from(NUMPY_TYPES))
other_arrays = st.sampled_from(
    [
        np.ma.masked_array([1.0, 2.0], mask=[True, False]),
        np.array([1.0, None], dtype=object),
        np.zeros(2, dtype=[("a", "f4")]),
        np.float64("nan"),
        np.array(["NaT"] * 2, dtype="M8[s]"),
        np.rec.array([(1.0,), (2.0,)], dtype=[("a", "f4")]),
    ]
)
odd_things = st.sampled_from(
    [
        *map(Hostile, ["len", "iter", "contains", "repr", "float", "lies", "nothing"]),
        OddNumber(1.0),
        OddType("Odd", (), {}),
        decimal.Decimal("NaN"),
        fractions.Fraction(1, 3),
        1j,
        10**5000,
        array.array("d", [1.0, 2.0]),
        memoryview(b"ab"),
        collections.deque([1.0, 2.0]),
        range(2),
        range(10**30),
        {1.0, 2.0},
        object(),
        len,
        bytearray(b"ab"),
        type,
    ]
)
things = st.one_of(inputs.json_values, tensors, other_tensors, arrays, other_arrays, odd_things)
function_answers = st.one_of(
    things, st.lists(things, min_size=2, max_size=2), st.tuples(things, st.floats(-9, 9)), st.lists(things, max_size=4)
)


@cases(function_answers, few=80, many=1500)
def test_answers_of_functions_are_scores_or_refused(answer: Any, folder: Path) -> None:
    with success_or_our_own_error():
        scores = RewardFunction(lambda prompts, responses: answer)(["p", "q \ud800"], ["r", "s"])
        assert scores.shape == (2,)
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()


errors = st.sampled_from([ValueError, KeyError, OSError, StopIteration, MemoryError, RecursionError, AssertionError])


@cases(st.tuples(errors, inputs.json_values, st.booleans()), few=20, many=200)
def test_functions_that_raise_are_refused(case: Any, folder: Path) -> None:
    error, argument, always = case

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if always or len(prompts) > 1:
            raise error(argument)
        return [0.0]

    with success_or_our_own_error():
        RewardFunction(score)(["p", "q"], ["r", "s"])


specs = st.one_of(
    st.text(max_size=12),
    st.text("ab.:_ 1é\0", max_size=10),
    st.sampled_from(["math:", "math:pi", "math:sin", "os.:a", "os:path", ":", "os.path:join"]),
)


@cases(specs, few=30, many=300)
def test_names_of_functions_are_found_or_refused(spec: str, folder: Path) -> None:
    with success_or_our_own_error():
        assert callable(load_reward_function(spec))


def test_the_clock_behind_the_dates_is_the_one_of_the_machine() -> None:
    soon = datetime.now(UTC).timestamp() + 100
    assert 90 < seconds_asked(datetime.fromtimestamp(soon, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")) <= 100
