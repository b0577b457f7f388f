"""Rollouts by vLLM engines that live in the ranks, and sleep while these train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.containers import Shard
from lightning_hybrid.engines.agreement import number_of_ranks, of_all_ranks, on_every_rank
from lightning_hybrid.engines.tensor_parallel import GroupPrompts, gather_prompts, tensor_parallel_shard
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.generation import Rollout, SamplingParams, check_prompts
from lightning_hybrid.models import base_of
from lightning_hybrid.rollout import RolloutBackend
from lightning_hybrid.rollout.params import sampling_params
from lightning_hybrid.rollout.vllm.engine import SleepingEngine
from lightning_hybrid.rollout.vllm.requests import rollout_of, sampling_of
from lightning_hybrid.rollout.vllm.startup import cache_bytes, check_room, end_engine, import_vllm, start_engine
from lightning_hybrid.rollout.vllm.weights import WeightStream, version_of


class VLLMRollout(RolloutBackend):
    """Sample responses with vLLM: one engine for each group of ``vllm.tensor_parallel_size`` ranks, inside them.

    Before it generates, an engine is given the trained weights, where they have changed since the last time. An engine
    that fails is started anew, once for each rollout; the same again stops the run.

    Args:
        config: lengths, sampling, and of the engines.
        eos_ids: ids that end a response.
        pad_id: id to pad with.
        tokenizer: as every backend is given it.
    """

    def __init__(self, config: RolloutConfig, eos_ids: Sequence[int], pad_id: int, tokenizer: Any = None) -> None:
        self.config = config
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.engine: SleepingEngine | None = None
        self.figures: dict[str, float] = {}
        self._shard = Shard()
        self._cache: int | None = None  # bytes of the KV cache that the first engine had
        self._started_for: tuple[Any, torch.device, torch.dtype]

    def prepare(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Start this rank's engine, which then sleeps; before training takes the device's memory. All ranks call it.

        Args:
            model: the causal LM that will generate.
            device: of this rank.
            dtype: of the engine's weights.

        Raises:
            ConfigError: on every rank, where an engine cannot be started on one.
        """
        config, size = self.config.vllm, self.config.vllm.tensor_parallel_size
        problem = config.problem_with(number_of_ranks())
        if problem is not None:
            raise ConfigError(f"rollout.vllm: {problem}")
        on_every_rank(self.close, "ending vLLM", ConfigError)
        # What one rank alone may fail at comes before what vLLM's ranks do together.
        on_every_rank(import_vllm, "importing vLLM", ConfigError)
        if self._cache is None:
            on_every_rank(lambda: check_room(config, device), "vLLM", ConfigError)
        weights = WeightStream(model)
        self._shard = tensor_parallel_shard(size) if size > 1 else Shard()
        self._started_for = (model, device, dtype)
        cache = self._cache
        self.engine = on_every_rank(
            lambda: start_engine(weights, config, device, dtype, cache), "starting vLLM", ConfigError
        )
        # Started anew, training holds memory that was free at first: it is to ask for what it had, not for a share.
        measured = [size for size in of_all_ranks(cache_bytes(self.engine)) if size is not None]
        self._cache = min(measured, default=cache)

    def close(self) -> None:
        """End this rank's engine."""
        engine, self.engine = self.engine, None
        if engine is not None:
            end_engine(engine)

    def generate(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        seed: int,
        greedy: bool = False,
        indices: Sequence[int] | None = None,
        n: int = 1,
    ) -> Rollout:
        """Sample ``n`` responses per prompt; see :class:`~lightning_hybrid.rollout.RolloutBackend`.

        Log-probs of both kinds are those under the distribution that was drawn from.

        Args:
            engine: the engine that trains, whose weights are taken, or a bare causal LM.
            prompts: token ids, at least one each.
            seed: of the random streams, the same on all ranks.
            greedy: take the most probable token instead of sampling.
            indices: of the prompts, over all ranks: a response depends on them, not on the rank that draws it.
            n: responses per prompt; they share one reading of it.

        Raises:
            RolloutError: on every rank, for a prompt that is empty or too long, or where an engine failed twice.
        """
        model = getattr(engine, "causal_lm", engine)
        sampling = sampling_params(self.config, self.eos_ids, greedy, n)
        if self.engine is None:
            first = next(model.parameters())
            self.prepare(model, first.device, first.dtype)
        on_every_rank(lambda: self._check(model, prompts, sampling), "the rollout", RolloutError)
        together = gather_prompts(prompts, indices, seed, sampling, self._shard)
        version = version_of(engine, model)
        rollout = self._attempts(lambda: self._generated(version, model, together, sampling, seed))
        self.figures = self._engine.figures
        if hasattr(engine, "timings"):
            others = sum(seconds for name, seconds in self.figures.items() if name != "generate_seconds")
            engine.timings.add_generation(len(prompts) * n, others, self.figures["generate_seconds"])
        return rollout.rows(together.begin * n, together.end * n)

    @property
    def _engine(self) -> SleepingEngine:
        assert self.engine is not None
        return self.engine

    def _check(self, model: Any, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        limit = int(self._engine.llm.llm_engine.model_config.max_model_len)
        vocabulary = base_of(model).get_input_embeddings().num_embeddings
        check_prompts(prompts, sampling, limit, "vLLM's", "tokens", vocabulary)

    def _generated(
        self, version: object, model: Any, together: GroupPrompts, sampling: SamplingParams, seed: int
    ) -> Rollout:
        rows = [prompt for prompt in together.prompts for _ in range(sampling.n)]
        how = sampling_of(import_vllm(), sampling, seed, together.indices)

        def respond() -> Rollout:
            outputs = self._engine.generate(rows, how)
            return rollout_of(rows, outputs, self.eos_ids, self.pad_id, self._started_for[1])

        # vLLM also draws from the streams that training goes on with.
        weights = None if self._engine.has(version) else WeightStream(model)
        with isolate_rng(), self._engine.awake(version, weights, _agreed):
            rollout: Rollout = _agreed(respond, "generating")
        return rollout

    def _attempts(self, attempt: Callable[[], Rollout]) -> Rollout:
        """What an attempt gives; where vLLM failed on a rank, a second one with new engines on all ranks."""
        try:
            return attempt()
        except EngineFailedError as error:
            if "out of memory" in str(error).lower():
                raise
            first = error
        rank_zero_warn(f"vLLM failed, and its engines are started anew, once: {first}")
        self.prepare(*self._started_for)
        try:
            return attempt()
        except EngineFailedError as error:
            raise RolloutError(f"{error}\nand before it was started anew: {first}") from error


class EngineFailedError(RolloutError):
    """A step of vLLM failed on a rank; raised on all of them."""


def _agreed(step: Callable[[], Any], what: str) -> Any:
    return on_every_rank(step, f"vLLM, {what},", EngineFailedError)
