"""An endpoint's answer: bytes in, one finite score per response out."""

from __future__ import annotations

import json
import reprlib
from typing import Any

import torch

from lightning_hybrid.errors import RewardError

LARGEST = torch.finfo(torch.float32).max
WANTED = '{"scores": [one finite number per response]}'


def parse_scores(body: bytes, count: int) -> list[float]:
    """Read the scores out of an answer ``{"scores": [0.5, -1, ...]}``; other keys beside ``scores`` are left alone.

    Args:
        body: JSON text, as it was received.
        count: Number of scores that it must have.

    Returns:
        The scores, each one finite in float32.

    Raises:
        RewardError: It is anything else; says what is wrong, not with which endpoint.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no text
        raise RewardError(f"the answer is not valid JSON ({error})") from error
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise RewardError(f"the answer is {_kind(answer)}, not {WANTED}")
    if len(scores) != count:
        raise RewardError(f"the answer has {len(scores)} scores for {count} responses")
    return [_score(value, index) for index, value in enumerate(scores)]


def is_score(value: object) -> bool:
    """Whether a value is a number that float32 can hold; booleans are not, nor is NaN."""
    # A comparison with NaN is false.
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _score(value: Any, index: int) -> float:
    if not is_score(value):
        # Texts are not shown here: they may hold anything, such as a token that was sent.
        shown = reprlib.repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"
        raise RewardError(f"score {index} is {shown}, not a finite number that float32 can hold")
    return float(value)


def _kind(answer: object) -> str:
    if isinstance(answer, dict):
        held = f"{type(answer['scores']).__name__} scores" if "scores" in answer else "no scores"
        return f"an object with {held}"
    return f"of type {type(answer).__name__}"
