"""A Python function as a reward, with its answer checked sample by sample."""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards.answers import is_score
from lightning_hybrid.rewards.base import Fields, Reward, taken
from lightning_hybrid.rewards.calling import Columns, SampleFailed, UserFunction, in_time
from lightning_hybrid.rewards.deadline import TookTooLong, check_seconds

RewardCallable = Callable[..., Any]
EXCERPT = 60


class RewardFunction(Reward):
    """Calls ``function(prompts, responses)`` and insists on one finite number per response.

    Further parameters are columns of the data by their names, ``async def`` is awaited, and a function of ``prompt``
    and ``response`` is called for each sample: see :class:`~lightning_hybrid.rewards.calling.UserFunction`.

    Numbers may be ints, floats, numpy scalars or 0-dim tensors in any sequence, or one 1-dim array or tensor. Booleans
    are refused like other non-numbers: a comparison returned by mistake looks the same as one meant as 0 and 1.

    The function runs in a thread of its own, a new one for each call, so that one that hangs does not hang the run.

    Args:
        function: Takes a list of prompts and one of responses, and columns of the data by their names.
        timeout_seconds: How long one batch may take. ``None``: for ever, in the thread of the caller; for functions
            that need that thread, such as those that use signals or a connection that belongs to it. An async function
            has the thread of its event loop in any case.

    Raises:
        ConfigError: ``function`` cannot be called, or the time limit is none.

    Example:
        >>> reward = RewardFunction(lambda prompts, responses: [len(r) for r in responses])
        >>> reward(["a", "b"], ["xx", "y"])
        tensor([2., 1.])
        >>> def right(prompts, responses, answer):
        ...     return [float(response == gold) for response, gold in zip(responses, answer)]
        >>> RewardFunction(right)(["1 + 1 = ", "1 + 2 = "], ["2", "4"], {"answer": ["2", "3"]})
        tensor([1., 0.])
    """

    def __init__(self, function: RewardCallable, timeout_seconds: float | None = 300.0) -> None:
        super().__init__()
        if not callable(function):
            raise ConfigError(f"the reward is {function!r}, which cannot be called: pass reward(prompts, responses)")
        self.function = function
        self.name: str = getattr(function, "__qualname__", type(function).__qualname__)
        if timeout_seconds is not None:
            check_seconds(f"reward {self.name!r}", timeout_seconds)
        self.timeout_seconds = timeout_seconds
        self._user = UserFunction(function, self.name)
        self._place = _place(function)
        self._own = uuid.uuid4().hex
        self.lasting = self._place is not None
        self.needed_fields = self._user.needed

    def columns_read(self, fields: Fields | None) -> frozenset[str]:
        """Those that its parameters name."""
        return self._user.reads(fields)

    def identity(self) -> str:
        """Where the function stands, and the content of that file; this object, where it stands in none by its name."""
        return f"{super().identity()} of {self._place or self._own}"

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """The scores.

        Args:
            prompts: One text per sample.
            responses: One text per sample.
            fields: Columns of the data, each with one value per sample.

        Returns:
            Float32[B], on the CPU.

        Raises:
            RewardError: A column is missing, or the function raised, did not end in time, or did not return one finite
                number per response. The message names the function, the sample, its value and the start of its prompt
                and response.
        """
        if len(prompts) != len(responses):
            raise RewardError(
                f"reward {self.name!r} was given {len(prompts)} prompts and {len(responses)} responses: pass one of "
                "each per sample"
            )
        answer = self._call(prompts, responses, fields)
        try:
            scores = self._scores(_plain(answer), prompts, responses)
        except RewardError:
            raise
        except Exception as error:  # an answer that fails when it is read: its length, an item, its text
            raise RewardError(
                f"reward {self.name!r} returned {_shown(answer)}, and reading it raised {_said(error)}: "
                f"return a list of one number per response"
            ) from error
        return torch.tensor(scores, dtype=torch.float32, device="cpu")

    def _call(self, prompts: list[str], responses: list[str], fields: Fields | None) -> Any:
        columns = taken(self.name, self.columns_read(fields), fields, len(responses))
        began = time.monotonic()
        try:
            return self._user.call(prompts, responses, columns, self.timeout_seconds)
        except TookTooLong as error:
            batch = f"{len(responses)} samples, from {_sample(0, prompts, responses)} on" if responses else "no samples"
            raise RewardError(
                f"reward {self.name!r} has not ended after {self.timeout_seconds:g} seconds, for {batch}: make it "
                "faster, give it smaller batches, or raise timeout_seconds"
            ) from error
        except SampleFailed as failed:
            cause, sample = failed.__cause__, _sample(failed.index, prompts, responses)
            raise RewardError(f"reward {self.name!r} raised {_said(cause)}, for {sample}") from cause
        except Exception as error:
            blamed = self._blamed(prompts, responses, columns, time.monotonic() - began)
            raise RewardError(f"reward {self.name!r} raised {_said(error)}, for {blamed}") from error

    def _blamed(self, prompts: list[str], responses: list[str], columns: Columns, spent: float) -> str:
        """The sample for which the function raises, looked for in what is left of the time."""
        left = None if self.timeout_seconds is None else self.timeout_seconds - spent
        try:
            index = in_time(lambda: self._first_raising(prompts, responses, columns), left)
        except TookTooLong:
            return f"{len(responses)} samples together; time was up before each had been tried alone"
        if index is None:
            return f"{len(responses)} samples together but for none alone"
        return _sample(index, prompts, responses)

    def _first_raising(self, prompts: list[str], responses: list[str], columns: Columns) -> int | None:
        """Finds the sample to blame by calling the function on one sample after the other."""
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            row = {name: [values[index]] for name, values in columns.items()}
            try:
                self._user.call([prompt], [response], row, None)
            except Exception:
                return index
        return None

    def _scores(self, answer: Any, prompts: list[str], responses: list[str]) -> list[float]:
        self._check_sequence(answer, prompts, responses)
        return [self._number(_plain(value), index, prompts, responses) for index, value in enumerate(answer)]

    def _check_sequence(self, answer: Any, prompts: list[str], responses: list[str]) -> None:
        wanted = f"return one number per response, {len(responses)} in all"
        if not isinstance(answer, Collection) or isinstance(answer, str | bytes | Mapping | Set):
            where = f" for {_sample(0, prompts, responses)}" if responses else ""
            raise RewardError(f"reward {self.name!r} returned {_shown(answer)}{where}: {wanted}")
        if len(answer) < len(responses):
            missing = _sample(len(answer), prompts, responses)
            raise RewardError(f"reward {self.name!r} returned {len(answer)} scores, none for {missing}: {wanted}")
        if len(answer) > len(responses):
            raise RewardError(f"reward {self.name!r} returned {len(answer)} scores: {wanted}")

    def _number(self, value: Any, index: int, prompts: list[str], responses: list[str]) -> float:
        problem = f"reward {self.name!r} returned {_shown(value)} for {_sample(index, prompts, responses)}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RewardError(f"{problem}: return a number, such as float(...)")
        if not is_score(value):
            raise RewardError(f"{problem}: return a finite number that float32 can hold")
        return float(value)


def _place(function: RewardCallable) -> str | None:
    """Module, name and content of the file by which a function is known again; None where its scores depend on more.

    So do those of a closure, a partial function or an object, which hold values of their own; and of what was typed
    into a console nobody knows the text.
    """
    try:
        module, name = function.__module__, function.__qualname__
        found = operator.attrgetter(name)(sys.modules.get(module))
        content = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").read_bytes()
    except (AttributeError, TypeError, OSError):
        return None
    return f"{module}:{name} {hashlib.sha256(content).hexdigest()}" if found is function else None


def _plain(value: Any) -> Any:
    """Turns tensors, arrays and numpy scalars into Python lists and numbers; other things pass."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def _shown(value: Any) -> str:
    return f"{_short(_text(repr, value) or 'an object without a readable form')} ({type(value).__name__})"


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {_text(str, error)}"


def _text(write: Callable[[Any], str], value: Any) -> str:
    """A foreign object's text, such that any terminal and log file can take it; empty where writing it fails."""
    try:
        return write(value).encode(errors="backslashreplace").decode()
    except Exception:  # its own affair, and not what the message is about; an int of thousands of digits fails too
        return ""


def _sample(index: int, prompts: list[str], responses: list[str]) -> str:
    return f"sample {index} (prompt {_short(prompts[index])!r}, response {_short(responses[index])!r})"


def _short(text: str) -> str:
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"
