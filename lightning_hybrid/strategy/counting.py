"""What counts as one ``trainer.global_step``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def counted_as_one(optimizers: Sequence[Any]) -> Iterator[None]:
    """Count all steps inside as one, also when there are none.

    Lightning's manual optimization counts by hooks that it puts on its optimizers around ``training_step``; they are
    called once here, and not by the steps inside.

    Args:
        optimizers: the strategy's ``LightningOptimizer`` objects.
    """
    hooks = [(optimizer._on_before_step, optimizer._on_after_step) for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer._on_before_step = optimizer._on_after_step = _count_nothing
    before, after = hooks[0]
    before()
    try:
        yield
    finally:
        for optimizer, (on_before, on_after) in zip(optimizers, hooks, strict=True):
            optimizer._on_before_step, optimizer._on_after_step = on_before, on_after
    after()


def _count_nothing() -> None:
    """Stand in for Lightning's counters."""
