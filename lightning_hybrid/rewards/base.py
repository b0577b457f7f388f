"""What every reward offers: scores, the columns it reads, the models it asks, and figures of its last call."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.models import ScalarModel

if TYPE_CHECKING:
    from lightning_hybrid.rewards.served import ServedReward

Fields = Mapping[str, Sequence[object]]
# The figure of responses that could not be judged, which score 0: 1 for such a response, else 0.
UNVERIFIED = "unverified"


class Reward(ABC):
    """Scores responses.

    A call does three things in turn, which a run on several ranks takes apart: `prepare`, at which one rank may fail
    alone; `run`, in which models that are sharded talk to the other ranks; and `conclude`, at which one rank may fail
    alone again.

    Attributes:
        name: for messages.
        needed_fields: columns of the data without which it cannot be called.
        models: reward models that engines may run, by the name of their term; alone, the name is empty.
        replicas: models that no engine runs, which every rank holds whole.
        served: the parts that ask a process of their own, which has to be started first.
        lasting: whether its identity stands for the same scores in another run, too.
        figures: of the last call, each ``[batch]`` float32 on the CPU with a mean worth logging, by their names.
    """

    name = "reward"
    needed_fields: frozenset[str] = frozenset()
    lasting = True

    def __init__(self) -> None:
        self.replicas: tuple[nn.Module, ...] = ()
        self.served: tuple[ServedReward, ...] = ()
        self.models: dict[str, ScalarModel] = {}
        self.figures: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """Score each response.

        Args:
            prompts: ``batch`` texts.
            responses: ``batch`` texts, each continuing its prompt.
            fields: columns of the data, each with one value per response.

        Returns:
            ``[batch]`` float32 on the CPU.

        Raises:
            RewardError: if a column is missing, or there is not one finite score for each response.
        """
        return self.conclude(self.run(self.prepare(prompts, responses, fields)))

    @abstractmethod
    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Any:
        """What comes before the models: all of it, where there are none."""

    def run(self, prepared: Any) -> Any:
        """Asks the models; a collective of all ranks where one of them is sharded."""
        return prepared

    def conclude(self, ran: Any) -> Tensor:
        """The scores, ``[batch]`` float32 on the CPU, checked."""
        scores: Tensor = ran
        return scores

    def columns_read(self, fields: Fields | None) -> frozenset[str]:
        """Those of the columns that there are on which the scores may depend."""
        return self.needed_fields

    def identity(self) -> str:
        """A text that changes with whatever changes the scores of the same texts, for a cache."""
        return f"{type(self).__name__} {self.name}"

    def to(self, device: torch.device) -> None:
        """Moves the models that no engine runs; called before each batch."""
        for model in self.replicas:
            model.to(device)


def check_fields(reward: Reward, columns: Collection[str], source: str = "the data") -> None:
    """Check, before training, that the data has the columns that a reward asks for.

    Args:
        reward: Any reward.
        columns: Those of the data beside the prompt.
        source: Where they are from, for the message.

    Raises:
        ConfigError: Naming each missing column, and the columns that there are.
    """
    problem = missing_columns(reward.name, reward.needed_fields, columns, source)
    if problem is not None:
        raise ConfigError(problem)


def taken(name: str, wanted: Collection[str], fields: Fields | None, count: int) -> dict[str, list[object]]:
    """The wanted columns.

    Raises:
        RewardError: One is missing, or has not one value for each of ``count`` responses.
    """
    fields = fields or {}
    problem = missing_columns(name, wanted, fields)
    if problem is not None:
        raise RewardError(problem)
    for column in wanted:
        if len(fields[column]) != count:
            raise RewardError(
                f"reward {name!r}: column {column!r} has {len(fields[column])} values for {count} responses: pass one "
                "of each per sample"
            )
    return {column: list(fields[column]) for column in sorted(wanted)}


def missing_columns(
    name: str, wanted: Collection[str], columns: Collection[str], source: str = "the data"
) -> str | None:
    """What to say about columns that are missing; None where none is."""
    missing = sorted(column for column in wanted if column not in columns)
    if not missing:
        return None
    there = ", ".join(repr(column) for column in sorted(columns)) or "none beside the prompt"
    close = [found for column in missing for found in difflib.get_close_matches(column, columns, n=1)]
    meant = f"; did you mean {' and '.join(map(repr, close))}?" if close else ""
    asked = " and ".join(map(repr, missing))
    return f"reward {name!r} asks for the column {asked}, which {source} does not have: columns are {there}{meant}"
