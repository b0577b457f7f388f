"""Rollouts through the model's own ``generate``: works for every causal LM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.engines import is_sharded
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.models import max_positions
from lightning_hybrid.rollout.carrier import Rollout, pad_left


class HFRollout:
    """Sample responses with Hugging Face's ``generate``.

    Args:
        config: lengths and sampling.
        eos_ids: ids that end a response.
        pad_id: id to pad with.
    """

    def __init__(self, config: RolloutConfig, eos_ids: Sequence[int], pad_id: int) -> None:
        self.config = config
        self.eos_ids = list(eos_ids)
        self.pad_id = pad_id

    def generate(self, engine: Any, prompts: Sequence[Sequence[int]], seed: int, greedy: bool = False) -> Rollout:
        """Sample one response per prompt.

        Args:
            engine: a :class:`~lightning_hybrid.engines.hybrid.HybridEngine` in inference, or a bare causal LM.
            prompts: token ids.
            seed: of the random stream; the caller's own stream is left as it was.
            greedy: take the most probable token instead of sampling.

        Raises:
            RolloutError: for an empty prompt, or one that leaves too few positions for a response.
        """
        model = getattr(engine, "causal_lm", engine)
        self._check(prompts, model.config)
        device = next(model.parameters()).device
        tokens, mask = pad_left(prompts, self.pad_id, device)
        recorder = SamplingRecorder(self.config, self.eos_ids, greedy)
        # An engine sees to its shards itself; a bare sharded model needs its ranks to run the same number of steps.
        in_step = {"synced_gpus": True} if engine is model and is_sharded(model) else {}
        with _random_stream(seed, device):
            output = engine.generate(
                tokens,
                attention_mask=mask.long(),
                generation_config=self._generation_config(greedy),
                logits_processor=LogitsProcessorList([recorder]),
                **in_step,
            )
        return self._carry(output, mask, recorder)

    def _check(self, prompts: Sequence[Sequence[int]], config: Any) -> None:
        limit = max_positions(config)
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise RolloutError(f"prompt {row} is empty: give it at least one token (a BOS will do)")
            if limit is not None and len(prompt) + self.config.max_new_tokens > limit:
                raise RolloutError(
                    f"prompt {row} has {len(prompt)} tokens; with max_new_tokens={self.config.max_new_tokens} that is "
                    f"more than the model's {limit} positions: shorten the prompt or lower rollout.max_new_tokens"
                )

    def _generation_config(self, greedy: bool) -> GenerationConfig:
        # Everything that would touch the logits before the recorder sees them is switched off by name, because
        # `generate` fills what is left open from the model's own generation_config.
        return GenerationConfig(
            max_new_tokens=self.config.max_new_tokens,
            do_sample=not greedy,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.pad_id,
        )

    def _carry(self, output: Tensor, mask: Tensor, recorder: SamplingRecorder) -> Rollout:
        width = mask.shape[1]
        new = output[:, width:]
        response, finished = _until_eos(new, self.eos_ids)
        new = new.masked_fill(~response, self.pad_id)
        policy, sampling = recorder.logprobs(output)
        before = torch.zeros_like(mask, dtype=torch.float32)
        return Rollout(
            tokens=torch.cat([output[:, :width], new], 1),
            prompt_mask=torch.cat([mask, torch.zeros_like(response)], 1),
            response_mask=torch.cat([torch.zeros_like(mask), response], 1),
            policy_logprobs=torch.cat([before, policy.masked_fill(~response, 0.0)], 1),
            sampling_logprobs=torch.cat([before, sampling.masked_fill(~response, 0.0)], 1),
            finish_reasons=tuple("eos" if done else "length" for done in finished.tolist()),
        )


class SamplingRecorder(LogitsProcessor):
    """Shape the logits for sampling, and keep the log-prob of what is then sampled.

    ``generate`` could return all scores, ``[steps, batch, vocab]``; this holds one step's and reads the
    sampled token at the next call.
    """

    def __init__(self, config: RolloutConfig, eos_ids: Sequence[int], greedy: bool) -> None:
        self.config = config
        self.eos_ids = list(eos_ids)
        self.greedy = greedy
        self._pending: tuple[Tensor, Tensor] | None = None
        self._policy: list[Tensor] = []
        self._sampling: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Shape ``scores`` ``[batch, vocab]``, the raw logits of the next token."""
        self._read(input_ids)
        raw = scores.float()
        shaped = self._shape(raw)
        self._pending = (raw.log_softmax(-1), shaped.log_softmax(-1))
        return shaped

    def logprobs(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs of all sampled tokens under the raw policy and as sampled, both ``[batch, new]`` float32."""
        self._read(output)
        return torch.stack(self._policy, 1), torch.stack(self._sampling, 1)

    def _read(self, tokens: Tensor) -> None:
        if self._pending is not None:
            last = tokens[:, -1:]
            policy, sampling = self._pending
            self._policy.append(policy.gather(1, last).squeeze(1))
            self._sampling.append(sampling.gather(1, last).squeeze(1))
            self._pending = None

    def _shape(self, logits: Tensor) -> Tensor:
        if len(self._policy) < self.config.min_new_tokens:
            logits = logits.index_fill(
                1, torch.tensor(self.eos_ids, device=logits.device, dtype=torch.long), -torch.inf
            )
        if self.greedy:
            return logits
        logits = logits / self.config.temperature
        if 0 < self.config.top_k < logits.shape[-1]:
            logits = _keep_top_k(logits, self.config.top_k)
        return _keep_top_p(logits, self.config.top_p) if self.config.top_p < 1.0 else logits


def _keep_top_k(logits: Tensor, k: int) -> Tensor:
    smallest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def _keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most probable tokens whose mass before each is below ``p``, at least one (Holtzman et al. 2020)."""
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    outside = probability.cumsum(-1) - probability >= p
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)


def _until_eos(tokens: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """True up to and including each row's first EOS, ``[batch, new]``; and whether there is one, ``[batch]``."""
    ends = torch.isin(tokens, torch.tensor(list(eos_ids), device=tokens.device, dtype=tokens.dtype))
    ended_before = ends.long().cumsum(1) - ends.long() > 0
    return ~ended_before, ends.any(1)


@contextmanager
def _random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block on a random stream of its own; the surrounding one goes on as if the block had not been there."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
