"""A Python function as a reward, with its answer checked sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hybrid.errors import ConfigError, RewardError

RewardCallable = Callable[[list[str], list[str]], Any]
LARGEST = torch.finfo(torch.float32).max
EXCERPT = 60


class RewardFunction:
    """Calls ``function(prompts, responses)`` and insists on one finite number per response.

    Numbers may be ints, floats, numpy scalars or 0-dim tensors in any sequence, or one 1-dim array or tensor. Booleans
    are refused like other non-numbers: a comparison returned by mistake looks the same as one meant as 0 and 1.

    Example:
        >>> reward = RewardFunction(lambda prompts, responses: [len(r) for r in responses])
        >>> reward(["a", "b"], ["xx", "y"])
        tensor([2., 1.])
    """

    def __init__(self, function: RewardCallable) -> None:
        """Wraps ``function``; raises ConfigError if it cannot be called."""
        if not callable(function):
            raise ConfigError(f"the reward is {function!r}, which cannot be called: pass reward(prompts, responses)")
        self.function = function
        self.name: str = getattr(function, "__qualname__", type(function).__qualname__)

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores each response.

        Args:
            prompts: One text per sample.
            responses: One text per sample.

        Returns:
            Float32[B], on the CPU.

        Raises:
            RewardError: The function raised, or did not return one finite number per response. The message names the
                function, the sample, its value and the start of its prompt and response.
        """
        if len(prompts) != len(responses):
            raise RewardError(
                f"reward {self.name!r} was given {len(prompts)} prompts and {len(responses)} responses: pass one of "
                "each per sample"
            )
        answer = _plain(self._call(prompts, responses))
        self._check_sequence(answer, prompts, responses)
        scores = [self._number(_plain(value), index, prompts, responses) for index, value in enumerate(answer)]
        return torch.tensor(scores, dtype=torch.float32)

    def _call(self, prompts: list[str], responses: list[str]) -> Any:
        try:
            return self.function(list(prompts), list(responses))  # copies: what it is given is its own to change
        except Exception as error:
            problem = f"reward {self.name!r} raised {type(error).__name__}: {error}"
            index = self._first_raising(prompts, responses)
            if index is None:
                raise RewardError(f"{problem}, for {len(responses)} samples together but for none alone") from error
            raise RewardError(f"{problem}, for {_sample(index, prompts, responses)}") from error

    def _first_raising(self, prompts: list[str], responses: list[str]) -> int | None:
        """Finds the sample to blame by calling the function on one sample after the other."""
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                self.function([prompt], [response])
            except Exception:
                return index
        return None

    def _check_sequence(self, answer: Any, prompts: list[str], responses: list[str]) -> None:
        wanted = f"return one number per response, {len(responses)} in all"
        if not isinstance(answer, Collection) or isinstance(answer, str | bytes | Mapping | Set):
            where = f" for {_sample(0, prompts, responses)}" if responses else ""
            raise RewardError(
                f"reward {self.name!r} returned {_short(repr(answer))} ({type(answer).__name__}){where}: {wanted}"
            )
        if len(answer) < len(responses):
            missing = _sample(len(answer), prompts, responses)
            raise RewardError(f"reward {self.name!r} returned {len(answer)} scores, none for {missing}: {wanted}")
        if len(answer) > len(responses):
            raise RewardError(f"reward {self.name!r} returned {len(answer)} scores: {wanted}")

    def _number(self, value: Any, index: int, prompts: list[str], responses: list[str]) -> float:
        shown = f"{_short(repr(value))} ({type(value).__name__})"
        problem = f"reward {self.name!r} returned {shown} for {_sample(index, prompts, responses)}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RewardError(f"{problem}: return a number, such as float(...)")
        # A comparison with NaN is false, so NaN lands here too.
        if not -LARGEST <= value <= LARGEST:
            raise RewardError(f"{problem}: return a finite number that float32 can hold")
        return float(value)


def _plain(value: Any) -> Any:
    """Turns tensors, arrays and numpy scalars into Python lists and numbers; other things pass."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def _sample(index: int, prompts: list[str], responses: list[str]) -> str:
    return f"sample {index} (prompt {_short(prompts[index])!r}, response {_short(responses[index])!r})"


def _short(text: str) -> str:
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"
