"""A vLLM engine that is stepped by hand, so that requests come and go between any two steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.rollout.vllm.requests import Draw, how_to_draw, logprobs_of
from lightning_hybrid.rollout.vllm.startup import common_arguments, import_vllm, not_started
from lightning_hybrid.rollout.vllm.transfer import Announced, Meeting
from lightning_hybrid.rollout.vllm.weights import refuse_missing
from lightning_hybrid.rollout.vllm.workers import join_group, receive_weights


class Drawn(NamedTuple):
    """What one step added to a response.

    Attributes:
        name: of the request.
        tokens: that were drawn.
        logprobs: of them, nats.
        ended: why it is finished, in vLLM's words; None while it is not.
    """

    name: str
    tokens: list[int]
    logprobs: list[float]
    ended: str | None


class Machine:
    """One ``vllm.LLM`` of this process; its workers are here too, or with tensor parallelism in children.

    It belongs to one thread.

    Args:
        vllm: the module.
        llm: the engine.

    Attributes:
        longest: tokens that prompt and response may have together.
    """

    def __init__(self, vllm: Any, llm: Any) -> None:
        self._vllm, self._llm, self._engine = vllm, llm, llm.llm_engine
        self.longest = int(self._engine.model_config.max_model_len)

    def add(self, name: str, prompt: Sequence[int], draw: Draw, drawn: int) -> None:
        """Begin a response, or go on with one.

        Args:
            name: of the request, unique.
            prompt: token ids, with those that were drawn before.
            draw: how the whole response is drawn.
            drawn: tokens of it that the prompt ends with.
        """
        how = how_to_draw(self._vllm, draw, drawn)
        how.output_kind = import_module("vllm.sampling_params").RequestOutputKind.DELTA
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, how)

    def step(self) -> list[Drawn]:
        """Draw the next token of as many responses as there is room for."""
        return [_drawn(output.request_id, output.outputs[0]) for output in self._engine.step()]

    def stop(self, names: Sequence[str]) -> None:
        """Forget requests; after it no step of them is under way."""
        self._engine.abort_request(list(names))
        core = self._engine.engine_core.engine_core
        # vLLM begins a step before it has the tokens of the last, and tells its workers of the end in a further one.
        while core.batch_queue or core.scheduler.has_requests():
            self._engine.step()

    def join(self, meeting: Meeting, first: int, host: str) -> None:
        """Let its workers meet rank 0, see :func:`~lightning_hybrid.rollout.vllm.workers.join_group`."""
        self._llm.collective_rpc(join_group, args=(asdict(meeting), first, host))

    def take(self, announced: Announced, bucket_bytes: int) -> None:
        """Load the weights that rank 0 sends, and forget what was cached with the old ones. No request is under way.

        Raises:
            RolloutError: for weights of its own that did not come, or a cache that is still in use.
        """
        # In one call: vLLM takes what a call does not name for what it is to keep as it was at the beginning.
        missing = self._llm.collective_rpc(receive_weights, args=(announced, bucket_bytes))
        refuse_missing(set().union(*missing))
        if not self._llm.reset_prefix_cache():
            raise RolloutError("vLLM kept what it had cached with the weights of before: requests are under way")


def start_machine(config: VLLMConfig, model: str, device: torch.device, dtype: str) -> Machine:
    """An engine for a model's architecture, with weights that mean nothing.

    Args:
        config: of the engine.
        model: the model's configuration, as in its ``config.json``.
        device: type of the device that it runs on.
        dtype: of its weights and arithmetic.

    Raises:
        ConfigError: if vLLM cannot be imported, or cannot run the model in the memory that it may have.
    """
    vllm = import_vllm()
    # By itself it would choose so, but not on every platform.
    several = {"distributed_executor_backend": "mp"} if config.tensor_parallel_size > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(model)
        arguments = common_arguments(config, folder, device, dtype) | several | config.options
        try:
            return Machine(vllm, vllm.LLM(**arguments))
        except Exception as error:
            raise not_started(vllm, ", ".join(json.loads(model)["architectures"]), error) from error


def _drawn(name: str, answer: Any) -> Drawn:
    return Drawn(name, list(answer.token_ids), logprobs_of(answer), answer.finish_reason)
