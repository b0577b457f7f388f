"""Combinations that are known to be bad, or good only for some settings, as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["stop", "warn", "note"]


@dataclass(frozen=True)
class Combination:
    """Versions that do not go together.

    Attributes:
        packages: each package's range, such as ``">=2.11 <3"``; all of them must match.
        level: ``stop`` where no run works, ``warn`` where some do not or one may be wrong, ``note`` otherwise.
        problem: what happens.
        remedy: what to do.
        on: only with a GPU, only without one, or in both cases.
    """

    packages: Mapping[str, str]
    level: Level
    problem: str
    remedy: str
    on: Literal["gpu", "cpu", "both"] = "both"


COMBINATIONS = (
    Combination(
        {"transformers": ">4.43", "deepspeed": ">=0"},
        "note",
        "DeepSpeed's own inference kernels know no model of it: rollout.backend=deepspeed refuses to start",
        "rollout.backend=native, the default, generates with the trained weights; hf works with any model",
    ),
    Combination(
        {"torch": ">=0"},
        "note",
        "fp16 does not run on a CPU",
        "trainer.precision=32-true or bf16-true",
        on="cpu",
    ),
    Combination(
        {"vllm": ">=0.31", "transformers": ">=5.18"},
        "warn",
        "vLLM 0.31 asks for transformers below 5.18",
        "give vLLM an environment of its own, or transformers<5.18",
    ),
    Combination(
        {"bitsandbytes": "<0.46"},
        "warn",
        "adapter=qlora needs bitsandbytes 0.46",
        'pip install "lightning-hybrid[qlora]"',
    ),
    Combination(
        {"bitsandbytes": ">=0"},
        "note",
        "four-bit weights (adapter=qlora) are slow without a GPU",
        "adapter=lora trains the same adapter beside whole weights",
        on="cpu",
    ),
)


def within(version: str, ranges: str) -> bool:
    """Whether a version lies in all ranges, such as ``">=2.11 <3"``; no version lies in any."""
    if not re.match(r"\d", version):
        return False
    return all(_holds(version, condition) for condition in ranges.split())


def _holds(version: str, condition: str) -> bool:
    match = re.fullmatch(r"(>=|<=|>|<|==)([\d.]+)", condition)
    if match is None:
        raise ValueError(f"not a range of versions: {condition!r}")
    operator, bound = match[1], _release(match[2])
    have = _release(version)[: len(bound)] if match[1] in (">", "<=", "==") else _release(version)
    length = max(len(have), len(bound))
    left, right = (numbers + (0,) * (length - len(numbers)) for numbers in (have, bound))
    return {">=": left >= right, "<=": left <= right, ">": left > right, "<": left < right, "==": left == right}[
        operator
    ]


def _release(version: str) -> tuple[int, ...]:
    """``(2, 13, 0)`` of ``"2.13.0+cpu"``."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()
