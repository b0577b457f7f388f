"""Rollouts by vLLM engines in processes of their own, which generate while the ranks train."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.engines.agreement import number_of_ranks, on_every_rank, own_rank
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.generation import Rollout, SamplingParams, check_prompts
from lightning_hybrid.models import base_of
from lightning_hybrid.rollout import PipelinedBackend, PromptRequest
from lightning_hybrid.rollout.params import sampling_params
from lightning_hybrid.rollout.vllm.crew import Crew
from lightning_hybrid.rollout.vllm.orders import Orders
from lightning_hybrid.rollout.vllm.requests import Response, rollout_from
from lightning_hybrid.rollout.vllm.weights import version_of


class SeparateVLLM(PipelinedBackend):
    """Sample responses with vLLM engines in processes of their own, which are sent the trained weights.

    With fewer engines than ranks, consecutive ranks share one; with more, a rank deals its prompts to several. An
    engine that is lost is started anew, once between two weight updates, and asked again for what it had not given.

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
        self.crew: Crew | None = None
        self.figures: dict[str, float] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._ahead = Orders(str(own_rank()), urgent=False)
        self._refusal: Exception | None = None
        self._rounds = 0
        self._version = 0
        self._policy: Any = None
        self._policy_version: object = None
        self._held: object = None  # the weights that the engines have
        self._goes_on = False  # what is in flight, with the policy's weights

    def prepare(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Start the engines; all ranks call it.

        Args:
            model: the causal LM that will generate.
            device: of this rank.
            dtype: of the engines' weights.

        Raises:
            ConfigError: on every rank, where an engine cannot be started.
        """
        problem = self.config.vllm.problem_with(number_of_ranks())
        if problem is not None:
            raise ConfigError(f"rollout.vllm: {problem}")
        on_every_rank(self.close, "ending vLLM", ConfigError)
        self._device, self._vocabulary = device, base_of(model).get_input_embeddings().num_embeddings
        self.crew = Crew(self.config.vllm)
        try:
            self.crew.start(model, device, dtype)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the engines, and forget what they were asked for."""
        crew, self.crew = self.crew, None
        self._ahead.close()
        self._begin_anew()
        if crew is not None:
            crew.close()

    # ---- taking turns ------------------------------------------------------------------------------------------------

    def generate(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        seed: int,
        greedy: bool = False,
        indices: Sequence[int] | None = None,
        n: int = 1,
    ) -> Rollout:
        """Sample ``n`` responses per prompt with these weights; see :class:`~lightning_hybrid.rollout.RolloutBackend`.

        Log-probs of both kinds are those under the distribution that was drawn from.

        Args:
            engine: the engine that trains, whose weights are taken, or a bare causal LM.
            prompts: token ids, at least one each.
            seed: of the random streams, the same on all ranks.
            greedy: take the most probable token instead of sampling.
            indices: of the prompts, over all ranks: a response depends on them, not on the rank that asks for it.
            n: responses per prompt; they share one reading of it.

        Raises:
            RolloutError: on every rank, for a prompt that is empty or too long, or where an engine was lost twice.
        """
        model = getattr(engine, "causal_lm", engine)
        self._prepare_once(model)
        sampling = sampling_params(self.config, self.eos_ids, greedy, n)
        on_every_rank(lambda: self._check(prompts, sampling), "the rollout", RolloutError)
        begin = time.perf_counter()
        self._hold_with(engine, model)
        given = time.perf_counter()
        places = range(len(prompts)) if indices is None else indices
        requests = [PromptRequest(k, list(p), i, seed) for k, (p, i) in enumerate(zip(prompts, places, strict=True))]
        answered = self._answered(engine, requests, sampling)
        if self._held is not None and self._held == self._policy_version:
            self._crew.resume()
            self._goes_on = True
        self._note_seconds(engine, len(requests) * n, given - begin, time.perf_counter() - given)
        return rollout_from(*answered, self.eos_ids, self.pad_id, self._device)

    def _answered(
        self, engine: Any, requests: Sequence[PromptRequest], sampling: SamplingParams
    ) -> tuple[list[list[int]], list[Response]]:
        """Prompts and responses to requests that go before all others."""
        self._rounds += 1
        orders, keys = Orders(f"{own_rank()} {self._rounds}", urgent=True), range(len(requests))
        try:
            on_every_rank(lambda: orders.add(requests, sampling, self._crew.lines), "the rollout", RolloutError)
            self._until(orders, keys, len(keys), engine)
            return orders.take(keys)
        finally:
            orders.close()

    def _hold_with(self, engine: Any, model: Any) -> None:
        """Hold back what is under way, and let the engines have these weights."""
        version = version_of(engine, model)
        changed = version is None or version != self._held
        self._crew.forgive()
        self._held, self._goes_on = None, False
        renewed = self._crew.give(engine, self._version, {}, needed=changed)
        self._held = version
        self._ahead.add_again(renewed, self._crew.lines)

    def _note_seconds(self, engine: Any, responses: int, sync: float, generate: float) -> None:
        self.figures = {"sync_seconds": sync, "generate_seconds": generate}
        if hasattr(engine, "timings"):
            engine.timings.add_generation(responses, sync, generate)

    # ---- beside training ---------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[PromptRequest], n: int) -> None:
        """See :class:`~lightning_hybrid.rollout.PipelinedBackend`. What cannot be is told at the next meeting."""
        if not requests:
            return
        try:
            sampling = sampling_params(self.config, self.eos_ids, False, n)
            self._check([request.prompt for request in requests], sampling)
            self._ahead.add(requests, sampling, self._crew.lines)
        except RolloutError as error:
            self._refusal = error

    def update(self, engine: Any) -> int:
        """See :class:`~lightning_hybrid.rollout.PipelinedBackend`."""
        begin = time.perf_counter()
        model = getattr(engine, "causal_lm", engine)
        self._prepare_once(model)
        self._version += 1
        self._policy, self._policy_version = engine, version_of(engine, model)
        self._crew.forgive()
        self._give_policy({})
        self.figures = {"sync_seconds": time.perf_counter() - begin}
        return self._version

    def wait(self, keys: Collection[int], count: int) -> list[int]:
        """See :class:`~lightning_hybrid.rollout.PipelinedBackend`; all ranks call it, equally often."""
        if self._policy is None:
            raise RolloutError("responses are waited for before the engines have weights: call update() before")
        if not self._goes_on:
            self._give_policy({})
        self._until(self._ahead, keys, count, self._policy)
        wanted = set(keys)
        return [key for key in self._ahead.finished if key in wanted]

    def take(self, keys: Sequence[int], n: int) -> Rollout:
        """See :class:`~lightning_hybrid.rollout.PipelinedBackend`."""
        prompts, responses = self._ahead.take(keys)
        if len(responses) != len(keys) * n:
            raise RolloutError(f"{len(keys)} requests have {len(responses)} responses, and not {n} each")
        return rollout_from(prompts, responses, self.eos_ids, self.pad_id, self._device, versions=True)

    def _give_policy(self, lost: dict[int, str]) -> None:
        """Let the engines have the policy's weights, and go on with what is in flight."""
        self._held, self._goes_on = None, False
        renewed = self._crew.give(self._policy, self._version, lost)
        self._held = self._policy_version
        self._ahead.add_again(renewed, self._crew.lines)
        self._crew.resume()
        self._goes_on = True

    def _until(self, orders: Orders, keys: Collection[int], count: int, engine: Any) -> None:
        """Wait for responses, and where engines are lost meanwhile, let them be started anew."""
        while lost := self._crew.meet(lambda: self._gather(orders, keys, count)):
            if orders is self._ahead:
                self._give_policy(lost)
                continue
            renewed = self._crew.give(engine, self._version, lost)
            self._ahead.add_again(renewed, self._crew.lines)
            orders.add_again(self._crew.lines.clients.keys(), self._crew.lines)  # what is urgent is not held back

    def _gather(self, orders: Orders, keys: Collection[int], count: int) -> None:
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise refusal
        orders.gather(keys, count, self._crew.lines)

    def _prepare_once(self, model: Any) -> None:
        if self.crew is None:
            first = next(model.parameters())
            self.prepare(model, first.device, first.dtype)

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        check_prompts(prompts, sampling, self._crew.longest, "vLLM's", "tokens", self._vocabulary)

    @property
    def _crew(self) -> Crew:
        if self.crew is None:
            raise RolloutError("there are no engines: call prepare(), update() or generate() before")
        return self.crew
