"""Rollouts through the model's own ``generate``: works for every causal LM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.engines import is_sharded
from lightning_hybrid.generation import Rollout, Sampler, SamplingParams, StopTexts, check_prompts, pad_left
from lightning_hybrid.models import base_of, max_positions
from lightning_hybrid.rollout import RolloutBackend
from lightning_hybrid.rollout.params import sampling_params


class HFRollout(RolloutBackend):
    """Sample responses with Hugging Face's ``generate``.

    All rows are computed until the last one ends, and a response depends on its neighbours' random numbers: this is the
    plain path that the containers are compared with, and the one for models without a container.

    Args:
        config: lengths and sampling.
        eos_ids: ids that end a response.
        pad_id: id to pad with.
        tokenizer: needed where ``config.stop`` has texts.
    """

    def __init__(self, config: RolloutConfig, eos_ids: Sequence[int], pad_id: int, tokenizer: Any = None) -> None:
        self.config = config
        self.eos_ids = list(eos_ids)
        self.pad_id = pad_id
        self._stop = StopTexts(config.stop, tokenizer)

    def generate(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        seed: int,
        greedy: bool = False,
        indices: Sequence[int] | None = None,
        n: int = 1,
    ) -> Rollout:
        """Sample ``n`` responses per prompt; those of a prompt stand together.

        Args:
            engine: a :class:`~lightning_hybrid.engines.hybrid.HybridEngine` in inference, or a bare causal LM.
            prompts: token ids.
            seed: of the random stream; the caller's own stream is left as it was.
            greedy: take the most probable token instead of sampling.
            indices: of the prompts, over all ranks; ranks that hold different ones draw differently.
            n: responses per prompt.

        Raises:
            RolloutError: for an empty prompt, or one that leaves too few positions for a response.
        """
        model = getattr(engine, "causal_lm", engine)
        sampling = sampling_params(self.config, self.eos_ids, greedy)
        check_prompts(prompts, sampling, max_positions(base_of(model).config))
        device = next(model.parameters()).device
        tokens, mask = pad_left([prompt for prompt in prompts for _ in range(n)], self.pad_id, device)
        recorder = SamplingRecorder(sampling, mask)
        stopper = StopRecorder(self._stop, sampling, mask.shape[1])
        # An engine sees to its shards itself; a bare sharded model needs its ranks to run the same number of steps.
        in_step = {"synced_gpus": True} if engine is model and is_sharded(model) else {}
        run = model.generate if engine is model else engine.generate_with_model
        with _random_stream(hash((seed, *(indices or ())[:1])) % 2**63, device), torch.no_grad():
            output = run(
                tokens,
                attention_mask=mask.long(),
                generation_config=self._generation_config(greedy),
                # By keyword: None in the configuration would be filled with the model's own.
                eos_token_id=self.eos_ids or None,
                logits_processor=LogitsProcessorList([recorder]),
                stopping_criteria=StoppingCriteriaList([stopper] if self._stop else []),
                **in_step,
            )
        return self._carry(output, mask, recorder, stopper)

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
            pad_token_id=self.pad_id,
        )

    def _carry(self, output: Tensor, mask: Tensor, recorder: SamplingRecorder, stopper: StopRecorder) -> Rollout:
        width = mask.shape[1]
        new = output[:, width:]
        lengths, reasons = _ends(new, self.eos_ids, stopper.stopped)
        response = torch.arange(new.shape[1], device=new.device) < lengths[:, None]
        new = new.masked_fill(~response, self.pad_id)
        policy, sampling = recorder.logprobs(output)
        before = torch.zeros_like(mask, dtype=torch.float32)
        return Rollout(
            tokens=torch.cat([output[:, :width], new], 1),
            prompt_mask=torch.cat([mask, torch.zeros_like(response)], 1),
            response_mask=torch.cat([torch.zeros_like(mask), response], 1),
            policy_logprobs=torch.cat([before, policy.masked_fill(~response, 0.0)], 1),
            sampling_logprobs=torch.cat([before, sampling.masked_fill(~response, 0.0)], 1),
            finish_reasons=reasons,
        )


class SamplingRecorder(LogitsProcessor):
    """Shape the logits for sampling, and keep the log-prob of what is then sampled.

    ``generate`` could return all scores, ``[steps, batch, vocab]``; this holds one step's and reads the
    sampled token at the next call.

    Args:
        sampling: how to shape.
        mask: ``[batch, time]`` bool, True on prompt tokens.
    """

    def __init__(self, sampling: SamplingParams, mask: Tensor) -> None:
        self.sampling = sampling
        self._sampler = Sampler(sampling, sampling.eos_ids or (), mask.device)
        self._mask = mask
        self._pending: tuple[Tensor, Tensor] | None = None
        self._policy: list[Tensor] = []
        self._sampling: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Shape ``scores`` ``[batch, vocab]``, the raw logits of the next token."""
        self._read(input_ids)
        raw = scores.float()
        produced = torch.full((len(raw),), len(self._policy), device=raw.device)
        shaped = self._sampler.shape(raw, produced, self._seen(input_ids, raw))
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

    def _seen(self, input_ids: Tensor, logits: Tensor) -> Tensor | None:
        """Which tokens each row holds, padding aside, ``[batch, vocab]`` bool; None where nobody asks."""
        if self.sampling.repetition_penalty == 1.0:
            return None
        new = input_ids.shape[1] - self._mask.shape[1]
        real = torch.cat([self._mask, self._mask.new_ones(len(self._mask), new)], 1)
        counts = torch.zeros(logits.shape, dtype=torch.long, device=logits.device)
        return counts.scatter_add_(1, input_ids, real.long()) > 0


class StopRecorder(StoppingCriteria):
    """Stops rows that completed a stop text, and remembers after how many tokens.

    Args:
        texts: to look for.
        sampling: how many tokens a response has before it may end.
        width: of the padded prompts.

    Attributes:
        stopped: row → length of its response.
    """

    def __init__(self, texts: StopTexts, sampling: SamplingParams, width: int) -> None:
        self.texts, self.sampling, self.width = texts, sampling, width
        self.stopped: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows are done, ``[batch]`` bool."""
        length = input_ids.shape[1] - self.width
        if length >= self.sampling.min_new_tokens:
            for row, done in enumerate(self.texts.completed(input_ids[:, self.width :].tolist())):
                if done:
                    self.stopped.setdefault(row, length)
        return torch.tensor([row in self.stopped for row in range(len(input_ids))], device=input_ids.device)


def _ends(tokens: Tensor, eos_ids: Sequence[int], stopped: dict[int, int]) -> tuple[Tensor, tuple[str, ...]]:
    """Each response's length ``[batch]``, its EOS included, and why it ended, from ``[batch, new]`` tokens."""
    rows, new = tokens.shape
    ends = torch.isin(tokens, torch.tensor(list(eos_ids), device=tokens.device, dtype=tokens.dtype))
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, new + 1).tolist()
    lengths, reasons = [], []
    for row, at_eos in enumerate(first):
        at_stop = stopped.get(row, new + 1)
        lengths.append(min(at_eos, at_stop, new))
        reasons.append("length" if min(at_eos, at_stop) > new else "eos" if at_eos <= at_stop else "stop")
    return torch.tensor(lengths, device=tokens.device), tuple(reasons)


@contextmanager
def _random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Run a block on a random stream of its own; the surrounding one goes on as if the block had not been there."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
