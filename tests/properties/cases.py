"""Tests over generated inputs, in two sizes: a few with every run of the tests, many with ``-m slow``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from lightning_hybrid.errors import LightningHybridError

COUNT: Counter[str] = Counter()  # inputs by test
OUTCOMES: Counter[str] = Counter()
LONGEST_MESSAGE = 20_000
Check = Callable[[Any, Path], None]


def cases(inputs: SearchStrategy[Any], few: int, many: int) -> Callable[[Check], Callable[..., None]]:
    """Make a test of `check(value, folder)`, called for values out of `inputs`; the same ones in every run."""

    def decorate(check: Check) -> Callable[..., None]:
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])
        def test(examples: int, tmp_path: Path) -> None:
            @settings(
                max_examples=examples,
                derandomize=True,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            )
            @given(inputs)
            def one(value: Any) -> None:
                COUNT[check.__name__] += 1
                check(value, tmp_path)

            one()

        return test

    return decorate


@contextmanager
def success_or_our_own_error() -> Iterator[None]:
    """Anything else that is raised fails the test; so does a message that could not be printed, or fills the screen."""
    try:
        yield
        OUTCOMES["accepted"] += 1
    except LightningHybridError as error:
        OUTCOMES["refused"] += 1
        message = str(error)
        assert message.strip()
        assert len(message) < LONGEST_MESSAGE
        message.encode()
