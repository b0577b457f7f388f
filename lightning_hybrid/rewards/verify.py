"""Rewards that need no model: a right answer, a format, and no repetition."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import time
from abc import abstractmethod

import torch
from torch import Tensor

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards.base import UNVERIFIED, Fields, Reward, taken
from lightning_hybrid.rewards.deadline import check_seconds
from lightning_hybrid.rewards.gsm8k import last_number, marked_number
from lightning_hybrid.rewards.judge import Judge, NotJudged

LOGGER = logging.getLogger("lightning_hybrid")
SECONDS_EACH = 5.0  # that judging one response may take
LONGEST = 10_000  # characters at the end of a response in which its answer is looked for


class GoldUnreadable(Exception):
    """The right answer itself holds none."""


class JudgedReward(Reward):
    """1 for a right response, 0 for a wrong one, and 0 for one that could not be judged.

    Those are counted: the figure ``unverified`` has 1 for each, and a warning says how many and why.

    Args:
        name: for messages.
        answer_key: column of the right answers; None for a reward that needs none.
        timeout_seconds: for a batch. What is left then is not judged.
    """

    def __init__(self, name: str, answer_key: str | None, timeout_seconds: float = 300.0) -> None:
        super().__init__()
        self.name = name
        self.answer_key = answer_key
        self._readable = False
        self._unreadable: set[str] = set()
        self.timeout_seconds = check_seconds(f"reward {name!r}", timeout_seconds)
        self.figures = {UNVERIFIED: torch.zeros(0)}
        self.needed_fields = frozenset() if answer_key is None else frozenset({answer_key})

    @abstractmethod
    def is_right(self, response: str, gold: str, seconds: float) -> bool:
        """Whether a response is right.

        Raises:
            NotJudged: It cannot be told.
            GoldUnreadable: The right answer holds none.
        """

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """The scores, ``[batch]`` float32 on the CPU.

        Raises:
            RewardError: The column is missing, or two right answers in it and none so far can be read.
        """
        golds = self._golds(fields, len(responses))
        deadline = time.monotonic() + self.timeout_seconds
        scores = torch.zeros(len(responses))
        why: dict[int, Exception] = {}
        for row, (response, gold) in enumerate(zip(responses, golds, strict=True)):
            try:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise NotJudged(f"timeout_seconds of {self.timeout_seconds:g} for the batch was up")
                scores[row] = self.is_right(response, gold, min(SECONDS_EACH, left))
            except (NotJudged, GoldUnreadable) as error:
                why[row] = error
        self._refuse_useless_golds(golds, why)
        self.figures = {UNVERIFIED: torch.tensor([float(row in why) for row in range(len(responses))])}
        if why:
            self._warn(responses, why)
        return scores

    def _golds(self, fields: Fields | None, count: int) -> list[str]:
        """The right answers as text; numbers are written out."""
        if self.answer_key is None:
            return [""] * count
        column = taken(self.name, [self.answer_key], fields, count)[self.answer_key]
        known = (str, int, float)
        return [str(gold) if isinstance(gold, known) and not isinstance(gold, bool) else "" for gold in column]

    def _refuse_useless_golds(self, golds: list[str], why: dict[int, Exception]) -> None:
        """A right answer that cannot be read is a bad row; two of them before any that can are the wrong column."""
        self._unreadable |= {golds[row] for row, error in why.items() if isinstance(error, GoldUnreadable)}
        self._readable |= len(why) < len(golds)
        if not self._readable and len(self._unreadable) > 1:
            shown = " and ".join(repr(gold[:60]) for gold in sorted(self._unreadable, reverse=True)[:2])
            raise RewardError(
                f"reward {self.name!r}: no right answer in the column {self.answer_key!r} can be read, such as {shown}:"
                " set answer_key to the column that holds them"
            )

    def _warn(self, responses: list[str], why: dict[int, Exception]) -> None:
        row, error = next(iter(why.items()))
        reason = "the right answer cannot be read" if isinstance(error, GoldUnreadable) else str(error)
        LOGGER.warning(
            f"reward {self.name!r}: {len(why)} of {len(responses)} responses could not be verified and score 0; the "
            f"first, sample {row} ({responses[row][-60:]!r}): {reason}"
        )


class MathReward(JudgedReward):
    """Whether a response ends in the right mathematics, by the library math-verify (Hugging Face 2025).

    The right answer is LaTeX, with or without dollars, or a number; behind ``####`` where it has that. The response's
    answer is what math-verify finds, ``\\boxed{...}`` first, in its last 10,000 characters. Each is judged in a process
    of its own, within 5 seconds and 4 GiB.

    Raises:
        ConfigError: math-verify is not installed.
    """

    def __init__(self, answer_key: str = "answer", timeout_seconds: float = 300.0) -> None:
        super().__init__("math", answer_key, timeout_seconds)
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError('reward.verify is math, which needs math-verify: pip install "lightning-hybrid[math]"')
        self.judge = Judge("math")

    def identity(self) -> str:
        """With the version of math-verify."""
        return f"{super().identity()} {importlib.metadata.version('math-verify')} {self.answer_key}"

    def is_right(self, response: str, gold: str, seconds: float) -> bool:
        """As math-verify says."""
        right = self.judge.ask({"gold": gold, "response": response[-LONGEST:]}, seconds)
        if right is None:
            raise GoldUnreadable
        return right


class FormatReward(JudgedReward):
    """Whether a regular expression matches a whole response; a dot matches line breaks.

    Example:
        >>> reward = FormatReward(r"<think>.*</think>.*")
    """

    def __init__(self, pattern: str, timeout_seconds: float = 300.0) -> None:
        super().__init__("format", None, timeout_seconds)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"reward.format = {pattern!r} is no regular expression of Python: {error}") from error
        self.pattern = pattern
        self.judge = Judge("format")

    def identity(self) -> str:
        """With the pattern."""
        return f"{super().identity()} {self.pattern}"

    def is_right(self, response: str, gold: str, seconds: float) -> bool:
        """Whether it matches."""
        return bool(self.judge.ask({"pattern": self.pattern, "response": response}, seconds))


class GSM8KReward(JudgedReward):
    """Whether a response ends in the right number, as GSM8K marks it (Cobbe et al. 2021).

    The right number stands behind ``####``, or is the last of the column's text. The response's is the one behind its
    last ``####``, or else the last that it has, in its last 10,000 characters. They are compared as numbers: ``1,234``,
    ``$1234`` and ``1234.00`` are the same.
    """

    def __init__(self, answer_key: str = "answer", timeout_seconds: float = 300.0) -> None:
        super().__init__("gsm8k", answer_key, timeout_seconds)

    def is_right(self, response: str, gold: str, seconds: float) -> bool:
        """As numbers."""
        wanted, said = _answer(gold), _answer(response[-LONGEST:])
        if wanted is None:
            raise GoldUnreadable
        return said == wanted


class ExactReward(JudgedReward):
    """Whether a response is the right answer word for word; white space around both does not count."""

    def __init__(self, answer_key: str = "answer", timeout_seconds: float = 300.0) -> None:
        super().__init__("exact", answer_key, timeout_seconds)

    def is_right(self, response: str, gold: str, seconds: float) -> bool:
        """As text."""
        if not gold.strip():
            raise GoldUnreadable
        return response.strip() == gold.strip()


class RepetitionPenalty(Reward):
    """Minus the share of a response's n-grams of words that it has said before: 0 without repetition, above -1 always.

    With W words there are N = W - n + 1 n-grams, U of them different; the score is -(1 - U / N), and 0 where W < n.
    Words are what stands between white space, in lower case.

    Example:
        >>> RepetitionPenalty(2)([""], ["the cat the cat the cat"])  # 5 bigrams, 2 different
        tensor([-0.6000])
    """

    name = "repetition"

    def __init__(self, ngram: int = 3) -> None:
        super().__init__()
        self.ngram = ngram

    def identity(self) -> str:
        """With the length of an n-gram."""
        return f"{super().identity()} {self.ngram}"

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """The scores, ``[batch]`` float32 on the CPU."""
        return torch.tensor([-self._repeated(response.lower().split()) for response in responses])

    def _repeated(self, words: list[str]) -> float:
        ngrams = [tuple(words[start : start + self.ngram]) for start in range(len(words) - self.ngram + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _answer(text: str) -> object:
    marked = marked_number(text)
    return last_number(text) if marked is None else marked
