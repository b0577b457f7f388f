"""Choosing the rows kept for validation, by what they say and not by where they stand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

from lightning_hybrid.errors import DataError


class Identified(Protocol):
    """An example with a text that identifies it, and the place that it was read from."""

    @property
    def identity(self) -> str:
        """The text."""
        ...

    @property
    def where(self) -> str:
        """``file:line`` of its row."""
        ...


Example = TypeVar("Example", bound=Identified)


def split_by_hash(examples: Sequence[Example], fraction: float, source: str) -> tuple[list[Example], list[Example]]:
    """Split into training and validation rows.

    A hash of its text decides for each row, so a row keeps its side when others are added, removed or reordered, and
    equal rows are never on both sides.

    Args:
        examples: The rows.
        fraction: Share of rows for validation, in (0, 1); met on average.
        source: File names, for messages.

    Returns:
        The rows for training and those for validation, each in order.

    Raises:
        DataError: If either has none.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[is_held_out(example, fraction)].append(example)
    refuse_empty_side(len(sides[0]), len(sides[1]), fraction, source)
    return sides


def is_held_out(example: Identified, fraction: float) -> bool:
    """Whether an example is for validation."""
    return _unit_hash(example.identity) < fraction


def refuse_empty_side(training: int, validation: int, fraction: float, source: str) -> None:
    """Raise a `DataError` where a split leaves no rows for one of the two."""
    if not training or not validation:
        raise DataError(
            f"validation_fraction {fraction} leaves {training} rows for training and {validation} for "
            f"validation of the {training + validation} in {source}: both need one; change it, or set validation_path"
        )


def _unit_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48
