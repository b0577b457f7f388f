"""How a user's function wants to be called: read off its parameters, so that nobody writes an adapter."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.rewards.base import Fields
from lightning_hybrid.rewards.deadline import LONGEST, EventLoop, within

T = TypeVar("T")
Columns = dict[str, list[object]]
Sample = tuple[tuple[str, str], dict[str, object]]
AT_ONCE = 32  # responses that wait for an answer together, of an async function that takes one at a time
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class SampleFailed(Exception):
    """A function that takes one sample raised; its own error is the cause."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class UserFunction:
    """A function or callable object with its way to be called.

    - Its first two parameters are lists of prompts and responses, whatever they are called; but a function of
      ``prompt`` and ``response`` is called for one sample at a time, with texts.
    - Further parameters are columns of the data by their names: lists, or one value where it takes one sample. One with
      a default is left at that where there is no such column; ``**fields`` takes all columns. Where prompts are
      conversations there is one more, ``prompt_turns``: of each its turns, a list of ``role`` and ``content``.
    - ``async def`` runs in an event loop that lasts as long as this object, so that a client opened in one call serves
      the next; of those that take one sample, 32 wait at a time.

    Attributes:
        needed: columns without which it cannot be called.
        one_by_one: whether it takes one sample at a time.
        is_async: whether it must be awaited.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
        called = function if inspect.isroutine(function) or isinstance(function, partial) else type(function).__call__
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
        parameters = _parameters(function)
        first, further = parameters[:2], parameters[2:]
        self.one_by_one = [parameter.name for parameter in first] == ["prompt", "response"]
        self.needed = frozenset(p.name for p in further if p.kind in _NAMED and p.default is p.empty)
        self.optional = frozenset(p.name for p in further if p.kind in _NAMED) - self.needed
        self.takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._check(first)
        self._loop = EventLoop()

    def reads(self, fields: Fields | None) -> frozenset[str]:
        """Names of the columns that it is given."""
        there = frozenset(fields or {})
        return self.needed | (there if self.takes_all else self.optional & there)

    def call(self, prompts: list[str], responses: list[str], columns: Columns, seconds: float | None) -> Any:
        """What it answers to a batch, with the columns that it reads.

        Raises:
            SampleFailed: It takes one sample at a time, and raised.
            TookTooLong: Time was up.
        """
        if self.is_async:
            return self._loop.run(lambda: self._awaited(prompts, responses, columns), seconds or LONGEST)
        return in_time(lambda: self._called(prompts, responses, columns), seconds)

    def _called(self, prompts: list[str], responses: list[str], columns: Columns) -> Any:
        if not self.one_by_one:
            # copies: what it is given is its own to change
            return self.function(list(prompts), list(responses), **{name: list(c) for name, c in columns.items()})
        answers = []
        for index, arguments in enumerate(_samples(prompts, responses, columns)):
            try:
                answers.append(self.function(*arguments[0], **arguments[1]))
            except Exception as error:
                raise SampleFailed(index) from error
        return answers

    async def _awaited(self, prompts: list[str], responses: list[str], columns: Columns) -> Any:
        if not self.one_by_one:
            return await self.function(list(prompts), list(responses), **{n: list(c) for n, c in columns.items()})
        places = asyncio.Semaphore(AT_ONCE)

        async def one(index: int, arguments: Sample) -> Any:
            async with places:
                try:
                    answer: Awaitable[Any] = self.function(*arguments[0], **arguments[1])
                    return await answer
                except Exception as error:
                    raise SampleFailed(index) from error

        try:
            async with asyncio.TaskGroup() as group:  # one that raises ends the others
                tasks = [
                    group.create_task(one(index, arguments))
                    for index, arguments in enumerate(_samples(prompts, responses, columns))
                ]
        except BaseExceptionGroup as errors:
            first = _first(errors)
            raise first from first.__cause__
        return [task.result() for task in tasks]

    def _check(self, first: list[inspect.Parameter]) -> None:
        """Raise a ConfigError for a function that cannot take two positional arguments."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        starred = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in first)
        if starred or (len(first) == 2 and all(parameter.kind in positional for parameter in first)):
            return
        names = ", ".join(str(parameter) for parameter in first) or "nothing"
        raise ConfigError(
            f"reward {self.name!r} takes {names}: its first two parameters must be prompts and responses, and further "
            "ones columns of the data"
        )


def in_time(function: Callable[[], T], seconds: float | None) -> T:
    """Call with a limit, or in this thread without one."""
    return function() if seconds is None else within(seconds, function)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # some builtins tell nothing about themselves
        kind = inspect.Parameter.POSITIONAL_ONLY
        return [inspect.Parameter(name, kind) for name in ("prompts", "responses")]


def _samples(prompts: list[str], responses: list[str], columns: Columns) -> list[Sample]:
    """Positional and named arguments of each sample."""
    pairs = enumerate(zip(prompts, responses, strict=True))
    return [(pair, {name: values[index] for name, values in columns.items()}) for index, pair in pairs]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of the first sample that failed, or an order to stop."""
    leaves = errors.exceptions
    failed = sorted((error for error in leaves if isinstance(error, SampleFailed)), key=lambda error: error.index)
    orders = [error for error in leaves if not isinstance(error, SampleFailed)]
    return (orders or failed)[0]
