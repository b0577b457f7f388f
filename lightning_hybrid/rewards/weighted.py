"""Several rewards at once: their weighted sum, and each one's own scores for the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards.base import Fields, Reward


class WeightedRewards(Reward):
    """score = Σ weight · score of each term, summed in float64 in the order of the terms.

    Args:
        terms: weight and reward of each term, by its name. A weight of 0 is for a term that is only logged.

    Attributes:
        last_terms: each term's scores of the last call, without its weight, ``[batch]`` float32.

    Raises:
        ConfigError: if there are no terms, a weight is not finite, or all of them are 0.

    Example:
        >>> both = WeightedRewards({"length": (0.1, RewardFunction(lambda p, r: [len(x) for x in r]))})
        >>> both([""], ["12345"])
        tensor([0.5000])
    """

    name = "terms"

    def __init__(self, terms: Mapping[str, tuple[float, Reward]]) -> None:
        super().__init__()
        weights = {name: weight for name, (weight, _) in terms.items()}
        if not any(weights.values()) or not all(math.isfinite(weight) for weight in weights.values()):
            raise ConfigError(f"the weights of the reward's terms are {weights}: give finite ones, not all of them 0")
        self.weights = weights
        self.terms = {name: reward for name, (_, reward) in terms.items()}
        self.needed_fields = frozenset().union(*(reward.needed_fields for reward in self.terms.values()))
        self.models = {name: model for name, reward in self.terms.items() for model in reward.models.values()}
        self.lasting = all(reward.lasting for reward in self.terms.values())
        self.replicas = tuple(model for reward in self.terms.values() for model in reward.replicas)
        self.served = tuple(part for reward in self.terms.values() for part in reward.served)
        self.last_terms = {name: torch.zeros(0) for name in terms}
        self._note()

    def columns_read(self, fields: Fields | None) -> frozenset[str]:
        """Those of all terms."""
        return frozenset().union(*(reward.columns_read(fields) for reward in self.terms.values()))

    def identity(self) -> str:
        """Those of all terms, with their weights."""
        return " + ".join(f"{self.weights[name]} {reward.identity()}" for name, reward in self.terms.items())

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> dict[str, Any]:
        """What comes before the models, of each term; an error names the term."""
        return {name: self._named(name, "prepare", prompts, responses, fields) for name in self.terms}

    def run(self, prepared: dict[str, Any]) -> dict[str, Any]:
        """Asks the models of one term after the other, in the same order on every rank."""
        return {name: self._named(name, "run", part) for name, part in prepared.items()}

    def conclude(self, ran: dict[str, Any]) -> Tensor:
        """The weighted sum, ``[batch]`` float32 on the CPU; raises a RewardError where float32 cannot hold it."""
        self.last_terms = {name: self._named(name, "conclude", part) for name, part in ran.items()}
        self._note()
        total = sum(weight * self.last_terms[name].double() for name, weight in self.weights.items())
        scores = torch.as_tensor(total).float()
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            parts = {name: float(self.last_terms[name][row]) for name in self.terms}
            raise RewardError(f"the weighted sum of sample {row} is {scores[row]:g}: terms {parts}, {self.weights}")
        return scores

    def _named(self, term: str, step: str, *arguments: Any) -> Any:
        try:
            return getattr(self.terms[term], step)(*arguments)
        except RewardError as error:
            raise RewardError(f"term {term!r}: {error}") from error

    def _note(self) -> None:
        self.figures = dict(self.last_terms)
        for name, reward in self.terms.items():
            self.figures |= {f"{name}/{figure}": values for figure, values in reward.figures.items()}
