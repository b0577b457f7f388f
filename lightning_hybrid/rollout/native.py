"""Rollouts through inference containers over the trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.containers import reason_without_container
from lightning_hybrid.engines import gathered
from lightning_hybrid.generation import Rollout, generate, warn_without_container
from lightning_hybrid.rollout import RolloutBackend
from lightning_hybrid.rollout.hf import HFRollout
from lightning_hybrid.rollout.params import sampling_params


class NativeRollout(RolloutBackend):
    """Sample responses with the containers' decode loop; a model without a container with its own ``generate``.

    Args:
        config: lengths and sampling.
        eos_ids: ids that end a response.
        pad_id: id to pad with where the model generates by itself.
        tokenizer: needed where ``config.stop`` has texts.
    """

    def __init__(self, config: RolloutConfig, eos_ids: Sequence[int], pad_id: int, tokenizer: Any = None) -> None:
        self.config = config
        self.eos_ids = tuple(eos_ids)
        self.tokenizer = tokenizer
        self._fallback = HFRollout(config, eos_ids, pad_id, tokenizer)

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

        Args:
            engine: a :class:`~lightning_hybrid.engines.hybrid.HybridEngine` in inference, or a bare causal LM.
            prompts: token ids, at least one each.
            seed: of the random streams, the same on all ranks.
            greedy: take the most probable token instead of sampling.
            indices: of the prompts, over all ranks: a response depends on them, not on the rank that draws it.
            n: responses per prompt; they share one reading of it.
        """
        sampling = sampling_params(self.config, self.eos_ids, greedy, n)
        model = getattr(engine, "causal_lm", engine)
        if engine is model:
            longest = max((len(prompt) for prompt in prompts), default=0)
            reason = reason_without_container(model, longest + sampling.max_new_tokens)
        else:
            reason = engine.reason_without_container()
        if reason is not None:
            warn_without_container(model, reason)
            return self._fallback.generate(engine, prompts, seed, greedy, indices, n)
        budget = self.config.max_tokens_in_flight
        if engine is not model:
            rollout: Rollout = engine.sample(
                prompts, sampling, seed, indices, tokenizer=self.tokenizer, max_tokens_in_flight=budget
            )
            return rollout
        with gathered(model):
            return generate(
                model,
                prompts,
                sampling,
                seed,
                indices=indices,
                tokenizer=self.tokenizer,
                max_tokens_in_flight=budget,
            )
