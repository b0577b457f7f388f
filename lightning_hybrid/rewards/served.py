"""A reward model in a process of its own, which the ranks ask instead of holding it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.config.reward import RewardTermConfig
from lightning_hybrid.data.templates import TURNS
from lightning_hybrid.errors import RewardError, ServerError
from lightning_hybrid.rewards.base import Fields, Reward
from lightning_hybrid.rewards.classifier import identity_of
from lightning_hybrid.rewards.templates import CHAT
from lightning_hybrid.serving import ServerClient, ServerSpec

PROCESS = "lightning_hybrid.rewards.reward_process"


class ServedReward(Reward):
    """Scores with the model of a folder, in the process that a :class:`~lightning_hybrid.serving.ServerSpec` starts.

    The texts travel as they are; the process makes tokens of them, as a rank with the model would.

    Args:
        source: with ``path`` or ``classifier``.
        device: CUDA index of the process; None for the CPU.
    """

    def __init__(self, source: RewardTermConfig, device: int | None) -> None:
        super().__init__()
        self.source, self.device = source, device
        path = source.path if source.classifier is None else source.classifier.path
        self.name = str(path)
        self.served = (self,)
        self._client: ServerClient | None = None

    def spec(self, dtype: torch.dtype) -> ServerSpec:
        """The process to start.

        Args:
            dtype: of the model's weights and arithmetic; a classifier's is float32.
        """
        source = self.source.model_dump(mode="json", include={"path", "classifier"})
        settings = {"source": source, "dtype": str(dtype).removeprefix("torch."), "cuda": self.device is not None}
        return ServerSpec(
            f"the reward model '{self.name}'", PROCESS, settings, () if self.device is None else (self.device,)
        )

    def connect(self, client: ServerClient | None) -> None:
        """Ask there from now on; None: nowhere."""
        self._client = client

    def identity(self) -> str:
        """That of a classifier in the ranks: its scores are the same."""
        return super().identity() if self.source.classifier is None else identity_of(self.source.classifier)

    def columns_read(self, fields: Fields | None) -> frozenset[str]:
        """The turns of prompts, where a chat template takes them: those of the same model in a rank, for a cache."""
        source = self.source.classifier
        return frozenset({TURNS} & {*(fields or {})} if source is None or source.template == CHAT else ())

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """The scores, ``[batch]`` float32 on the CPU.

        Raises:
            RewardError: the model cannot score a text, as it says itself, or its process was never started.
            ServerError: its process does not answer.
        """
        if self._client is None:
            raise RewardError(f"the reward model '{self.name}' has no process yet: a Trainer starts it with its run")
        sent: dict[str, Any] = {name: list((fields or {})[name]) for name in self.columns_read(fields)}
        try:
            answer = self._client.call("score", prompts=prompts, responses=responses, fields=sent)
        except ServerError as error:
            if error.refused:
                raise RewardError(str(error)) from error
            raise
        return torch.tensor(answer["scores"], dtype=torch.float32)
