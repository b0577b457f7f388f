"""From prompts to responses. A backend has one method, ``generate``; which one runs is a line in :data:`BACKENDS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from lightning_hybrid.generation import Rollout, join, pad_left

if TYPE_CHECKING:
    from lightning_hybrid.config import RolloutConfig

__all__ = ["BACKENDS", "Rollout", "RolloutBackend", "join", "make_backend", "pad_left"]

# Name in the configuration → module and class.
BACKENDS = {
    "native": ("lightning_hybrid.rollout.native", "NativeRollout"),
    "deepspeed": ("lightning_hybrid.rollout.deepspeed", "DeepSpeedRollout"),
    "hf": ("lightning_hybrid.rollout.hf", "HFRollout"),
    "vllm": ("lightning_hybrid.rollout.vllm", "VLLMRollout"),
}


class RolloutBackend(ABC):
    """What generates."""

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


def make_backend(config: RolloutConfig, eos_ids: Sequence[int], pad_id: int, tokenizer: Any = None) -> RolloutBackend:
    """The backend that ``config.backend`` names."""
    module, name = BACKENDS[config.backend]
    backend: RolloutBackend = getattr(import_module(module), name)(config, eos_ids, pad_id, tokenizer)
    return backend
