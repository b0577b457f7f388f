"""The values of a row, where they are what they must be."""

from __future__ import annotations

import reprlib
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lightning_hybrid.data.checking import Problems

if TYPE_CHECKING:
    from lightning_hybrid.data.reading import Row

LARGEST = 3.4028234663852886e38  # batches hold float32, which would turn more than this into infinity


def text_field(row: Row, key: str, problems: Problems) -> str:
    """Return the text under ``key``, or note the problem and return an empty text."""
    if key not in row.fields:
        close = get_close_matches(key, row.fields, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        problems.add(row.where, f"no key {key!r}; the row has {_names(row)}{hint}")
        return ""
    value = row.fields[key]
    if not isinstance(value, str):
        problems.add(row.where, f"{key!r} must be text, found {type(value).__name__}: {_short(value)}")
        return ""
    wrong = surrogate_problem(value)
    if wrong:
        problems.add(row.where, f"{key!r} {wrong}")
        return ""
    return value


def surrogate_problem(text: str) -> str:
    """Say that a text cannot be written down, as it holds half of a surrogate pair; empty where it can."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"holds half of a surrogate pair, which is no character: {_short(text)}"
    return ""


def label_field(row: Row, key: str, problems: Problems) -> bool:
    """Return whether the label under ``key`` is 1, or note the problem (only 0 and 1 are labels)."""
    value = row.fields.get(key)
    if value in (1, "1"):
        return True
    if value not in (0, "0"):
        found = _short(value) if key in row.fields else f"no such key; the row has {_names(row)}"
        problems.add(row.where, f"{key!r} must be 0 (negative) or 1 (positive), found {found}")
    return False


def number_field(row: Row, key: str, problems: Problems) -> float:
    """Return the number under ``key``, or note the problem and return 0."""
    value = row.fields.get(key)
    try:
        number = float(value) if isinstance(value, int | float | str) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not -LARGEST <= number <= LARGEST:  # false for NaN too
        found = _short(value) if key in row.fields else f"no such key; the row has {_names(row)}"
        problems.add(row.where, f"{key!r} must be a finite number that float32 can hold, found {found}")
        return 0.0
    return number


def _names(row: Row) -> str:
    return ", ".join(repr(name) for name in row.fields) or "no keys"


def _short(value: object) -> str:
    return reprlib.repr(value)  # bounded in depth as well as in length: a value may be nested a thousand deep
