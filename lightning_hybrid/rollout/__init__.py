"""From prompts to responses. A backend has one method, ``generate``; which one runs is a line in :data:`BACKENDS`.

One that can generate beside training has four more, see :class:`PipelinedBackend`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lightning_hybrid.generation import Rollout, join, pad_left

if TYPE_CHECKING:
    from lightning_hybrid.config import RolloutConfig

__all__ = [
    "BACKENDS",
    "PipelinedBackend",
    "PromptRequest",
    "Rollout",
    "RolloutBackend",
    "join",
    "make_backend",
    "pad_left",
]

# Name in the configuration → module and class.
BACKENDS = {
    "native": ("lightning_hybrid.rollout.native", "NativeRollout"),
    "deepspeed": ("lightning_hybrid.rollout.deepspeed", "DeepSpeedRollout"),
    "hf": ("lightning_hybrid.rollout.hf", "HFRollout"),
    "vllm": ("lightning_hybrid.rollout.vllm", "VLLMRollout"),
}


class RolloutBackend(ABC):
    """What generates.

    Attributes:
        figures: of the last rollout or weight update, by name, such as ``sync_seconds``; logged as ``rollout/<name>``.
    """

    figures: Mapping[str, float] = MappingProxyType({})

    def prepare(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Take what is needed beside the model, before training takes the device's memory; all ranks call it.

        Args:
            model: the causal LM that will generate.
            device: of this rank.
            dtype: that the model will have.
        """
        return

    def close(self) -> None:
        """Give it back."""
        return

    @abstractmethod
    def generate(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        seed: int,
        greedy: bool = False,
        indices: Sequence[int] | None = None,
        n: int = 1,
    ) -> Rollout:
        """Sample ``n`` responses per prompt with the engine's weights; those of a prompt stand together.

        ``seed`` is the same on all ranks; ``indices`` number the prompts over all of them.
        """


@dataclass(frozen=True)
class PromptRequest:
    """A prompt to which responses are wanted.

    Attributes:
        key: names the request, unique among all that this rank ever submits in a run.
        prompt: token ids.
        index: number of the prompt over all ranks, which with ``seed`` decides its random stream.
        seed: of the draw.
    """

    key: int
    prompt: list[int]
    index: int
    seed: int


class PipelinedBackend(RolloutBackend):
    """What generates beside training: responses are asked for now and taken later.

    Weights have versions: 0 as they are when the engines start, one more with each :meth:`update`. What is in flight
    when new weights arrive goes on with them, so that the tokens of one response may be of several versions:
    :attr:`Rollout.versions <lightning_hybrid.generation.Rollout>` tells which.

    :meth:`generate` waits for its responses as any other backend's does, and is of the weights that it is passed.
    What is in flight is held back meanwhile and goes on afterwards, with the policy's weights: those of :meth:`update`.
    """

    @abstractmethod
    def submit(self, requests: Sequence[PromptRequest], n: int) -> None:
        """Begin ``n`` responses to each prompt, and return at once; concerns this rank alone."""

    @abstractmethod
    def update(self, engine: Any) -> int:
        """Give the engines that generate the weights of now; all ranks call it.

        Args:
            engine: the actor's.

        Returns:
            The version of these weights: 1, 2, …; equal on all ranks.
        """

    @abstractmethod
    def wait(self, keys: Collection[int], count: int) -> list[int]:
        """Wait until ``count`` of these requests have all their responses; all ranks call it, equally often.

        What is waited for may differ from rank to rank, and may be nothing. The ranks meet at the end of it, so that an
        engine that died under one of them is started anew, and given weights, by all.

        Returns:
            Those of ``keys`` that have, in the order in which they were finished: ``count`` or more.

        Raises:
            RolloutError: on every rank, if an engine died twice, or nothing was heard of one for too long.
        """

    @abstractmethod
    def take(self, keys: Sequence[int], n: int) -> Rollout:
        """The responses to requests that are finished, in the order of ``keys``, and forget these requests.

        Returns:
            A rollout with ``n`` rows to each key, which stand together, and with ``versions``.
        """


def make_backend(config: RolloutConfig, eos_ids: Sequence[int], pad_id: int, tokenizer: Any = None) -> RolloutBackend:
    """The backend that ``config.backend`` names."""
    module, name = BACKENDS[config.backend]
    if config.backend == "vllm" and not config.vllm.colocate:
        name = "SeparateVLLM"
    backend: RolloutBackend = getattr(import_module(module), name)(config, eos_ids, pad_id, tokenizer)
    return backend
