"""What a rank tells the notebook that started it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from lightning_hybrid.errors import StrategyError


@dataclass(frozen=True)
class Call:
    """Call a function in the notebook's process, such as one that shows a picture.

    Attributes:
        pickled: the function and its arguments, as cloudpickle writes them.
    """

    pickled: bytes

    def __call__(self) -> None:
        """Call it."""
        function, args = pickle.loads(self.pickled)
        function(*args)


@dataclass(frozen=True)
class Failed:
    """The job raised.

    Attributes:
        pickled: the error; None for one that cannot be copied.
        described: the error's type and text.
        traceback: of the rank.
        follows: whether the error is the loss of another rank.
    """

    pickled: bytes | None
    described: str
    traceback: str
    follows: bool

    def error(self) -> BaseException:
        """The error, or one that says what it was."""
        if self.pickled is None:
            return StrategyError(self.described)
        error: Any = pickle.loads(self.pickled)
        assert isinstance(error, BaseException)
        return error


@dataclass(frozen=True)
class Stopped:
    """The job was stopped by a signal."""
