"""A whole training step, from prompts to changed weights."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from peers.subject import Source
from peers.workload import Workload


@dataclass(frozen=True)
class Step:
    """Seconds of a step, those of its rollout, and the tokens that it sampled and trained on."""

    seconds: float
    rollout: float
    tokens: int


class StepRun(ABC):
    """Something that takes training steps and can be timed from one to the next."""

    name: ClassVar[str]

    @staticmethod
    @abstractmethod
    def absent() -> str | None:
        """Why it cannot be measured here, or None where it can."""

    @abstractmethod
    def run(self, source: Source, workload: Workload, per_prompt: int, steps: int, seed: int) -> list[Step]:
        """Train a fresh copy of the weights for some steps.

        Args:
            source: of the weights and the tokenizer.
            workload: as many rows as one step samples; the prompts that count are its first ones.
            per_prompt: responses to each prompt.
            steps: to time.
            seed: of sampling.
        """

    @staticmethod
    def reward(responses: Sequence[str]) -> list[float]:
        """A reward that costs nothing and has some variance."""
        return [len(response) % 7 / 7 for response in responses]

    @staticmethod
    def between(begun: Sequence[float], rollouts: Sequence[float], tokens: Sequence[int]) -> list[Step]:
        """Steps from the times at which each began: it ends where the next begins."""
        seconds = (after - before for before, after in pairwise(begun))
        return [Step(*figures) for figures in zip(seconds, rollouts, tokens, strict=False)]


@dataclass(frozen=True)
class Steps:
    """The steps that one of them took, round by round."""

    name: str
    rounds: list[list[Step]]

    @property
    def seconds(self) -> float:
        """Of a step: median of the rounds' medians."""
        return statistics.median(map(_seconds, self.rounds))

    def median(self, figure: Callable[[Step], float]) -> float:
        """Median of a figure over all steps."""
        return statistics.median(figure(one) for taken in self.rounds for one in taken)

    def slower_than(self, first: Steps) -> float:
        """How many times as long as the first one's step: median of the ratios of the rounds."""
        pairs = zip(first.rounds, self.rounds, strict=True)
        return statistics.median(_seconds(theirs) / _seconds(ours) for ours, theirs in pairs)


def take_turns(
    runs: Sequence[StepRun], source: Source, workload: Workload, per_prompt: int, steps: int, rounds: int
) -> list[Steps]:
    """Let each take its steps, one after another in every round; a first round does not count."""
    taken: dict[str, list[list[Step]]] = {run.name: [] for run in runs}
    for number in range(rounds + 1):
        for run in runs:
            taken[run.name].append(run.run(source, workload, per_prompt, steps, seed=number))
    return [Steps(name, by_round[1:]) for name, by_round in taken.items()]


def _seconds(steps: Sequence[Step]) -> float:
    return statistics.median(one.seconds for one in steps)
