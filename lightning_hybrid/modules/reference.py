"""The frozen reference in a process of its own, which the ranks ask instead of holding it."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.errors import ServerError
from lightning_hybrid.generation import in_place, lay_out
from lightning_hybrid.rollout import Rollout
from lightning_hybrid.serving import ServerClient, ServerSpec
from lightning_hybrid.serving.background import in_background

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule

PROCESS = "lightning_hybrid.modules.reference_process"


class ServedReference:
    """Asks the process that a :class:`~lightning_hybrid.serving.ServerSpec` starts for log-probs and for responses.

    Args:
        source: folder or hub name of the model.
        device: CUDA index of the process; None for the CPU.
    """

    def __init__(self, source: str, device: int | None) -> None:
        self.source, self.device = source, device
        self._client: ServerClient | None = None

    def spec(self, module: PPOModule, dtype: torch.dtype) -> ServerSpec:
        """The process to start.

        Args:
            module: whose rollouts it judges, and to whose prompts it responds.
            dtype: of its weights and arithmetic.
        """
        settings = {
            "source": self.source,
            "dtype": str(dtype).removeprefix("torch."),
            "cuda": self.device is not None,
            "chunk": module.config.logprob_chunk,
            "rollout": _without_engines(module.rollout_config).model_dump(mode="json"),
            "ends": module._ends,
            "tokenizer": _files_of(module.tokenizer),
        }
        return ServerSpec("the reference", PROCESS, settings, () if self.device is None else (self.device,))

    def connect(self, client: ServerClient | None) -> None:
        """Ask there from now on; None: nowhere."""
        self._client = client

    def begin(self, rollout: Rollout, micro_batch_size: int, temperature: float) -> Callable[[], Tensor]:
        """Have log-probs computed from now on.

        Args:
            rollout: of this rank.
            micro_batch_size: rows that the process computes together.
            temperature: of the distribution.

        Returns:
            A function that waits for them: ``[batch, time]`` float32, 0 outside the responses. Called again, it has
            them computed again. It raises a ServerError where the process does not answer.
        """
        request = {"prompts": rollout.prompts, "responses": rollout.responses}
        numbers = {"micro_batch_size": micro_batch_size, "temperature": temperature}

        def ask() -> dict[str, Any]:
            return self._call("logprobs", **request, **numbers)

        begun = [in_background(ask)]

        def wait() -> Tensor:
            answer = begun.pop().result() if begun else ask()
            return in_place(answer["logprobs"], rollout.response_mask, torch.float32)

        return wait

    def respond(
        self, prompts: Sequence[Sequence[int]], seed: int, indices: Sequence[int], device: torch.device
    ) -> Rollout:
        """Greedy responses on a device, see :class:`~lightning_hybrid.rollout.RolloutBackend`."""
        answer = self._call("respond", prompts=[list(ids) for ids in prompts], seed=seed, indices=list(indices))
        return _rollout(prompts, answer, device)

    def _call(self, route: str, **values: Any) -> dict[str, Any]:
        if self._client is None:
            raise ServerError("the reference has no process yet: a Trainer starts it with its run")
        return self._client.call(route, **values)


def _without_engines(config: RolloutConfig) -> RolloutConfig:
    """How to generate with a model that is at hand: with containers in place of vLLM, whose answers are the same."""
    values = config.model_dump(exclude={"vllm", "max_staleness"})
    return RolloutConfig(**values | {"backend": "native" if config.backend == "vllm" else config.backend})


def _rollout(prompts: Sequence[Sequence[int]], answer: dict[str, Any], device: torch.device) -> Rollout:
    tokens, prompted, responded = lay_out(prompts, answer["responses"], 0, device)
    of_policy, of_sampling = (
        in_place(answer[name], responded, torch.float32) for name in ("policy_logprobs", "sampling_logprobs")
    )
    return Rollout(tokens, prompted, responded, of_policy, of_sampling, tuple(answer["finish_reasons"]))


def _files_of(tokenizer: Any) -> dict[str, str]:
    """A tokenizer's files by their names, in base64: a process elsewhere may not see this machine's disk."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = (file for file in Path(folder).rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): base64.b64encode(file.read_bytes()).decode() for file in files}
