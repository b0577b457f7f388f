"""Drawing the next token: shaping logits, random numbers of each response's own, and log-probs of what was drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hybrid.generation.sampling import SamplingParams

# SplitMix64 (Steele et al. 2014), in two's complement.
_GAMMA, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
_WORD = 2**64


class Drawn(NamedTuple):
    """One token per row.

    Attributes:
        tokens: ``[rows]`` long.
        policy_logprobs: ``[rows]`` float32, under the logits as the model gave them.
        sampling_logprobs: ``[rows]`` float32, under the distribution drawn from; with temperature 0, under the shaped
            logits of which the largest was taken.
        entropies: ``[rows]`` float32, nats, of the model's own distribution; None where not asked for.
        finite: ``[rows]`` bool, False where the logits are not numbers.
    """

    tokens: Tensor
    policy_logprobs: Tensor
    sampling_logprobs: Tensor
    entropies: Tensor | None
    finite: Tensor


class Sampler:
    """Draws one token per row. Nothing in it waits for the device.

    Args:
        sampling: how.
        eos_ids: tokens that may not come before ``min_new_tokens``.
        device: of the logits.
    """

    def __init__(self, sampling: SamplingParams, eos_ids: Sequence[int], device: torch.device) -> None:
        self.sampling = sampling
        self.eos_ids = torch.tensor(list(eos_ids), device=device, dtype=torch.long)

    def __call__(self, logits: Tensor, keys: Tensor, produced: Tensor, seen: Tensor | None = None) -> Drawn:
        """Draw.

        Args:
            logits: ``[rows, vocabulary]`` float32.
            keys: ``[rows]`` long, each row's random stream, see :func:`stream_key`.
            produced: ``[rows]`` long, tokens drawn before.
            seen: ``[rows, vocabulary]`` bool, tokens that the row holds; needed with a repetition penalty.
        """
        shaped = self.shape(logits, produced, seen)
        raw = _exponential(logits)
        drawn_from = raw if shaped is logits else _exponential(shaped)
        greedy = self.sampling.greedy
        tokens = shaped.argmax(-1) if greedy else invert(drawn_from.weights, uniform(keys, produced))
        return Drawn(
            tokens,
            _logprob(logits, tokens, raw),
            _logprob(shaped, tokens, drawn_from),
            _entropy(logits, raw) if self.sampling.entropy else None,
            torch.isfinite(raw.log_sum).squeeze(-1),
        )

    def shape(self, logits: Tensor, produced: Tensor, seen: Tensor | None) -> Tensor:
        """The logits drawn from; ``logits`` itself where nothing shapes them. Arguments as in a call."""
        sampling = self.sampling
        shaped = logits
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            penalized = torch.where(shaped > 0, shaped / penalty, shaped * penalty)
            shaped = torch.where(seen, penalized, shaped)  # type: ignore[arg-type]
        if sampling.min_new_tokens and len(self.eos_ids):
            early = (produced < sampling.min_new_tokens)[:, None]
            shaped = shaped.index_fill(1, self.eos_ids, -torch.inf).where(early, shaped)
        if sampling.greedy:
            return shaped
        if sampling.temperature != 1.0:
            shaped = shaped / sampling.temperature
        if 0 < sampling.top_k < shaped.shape[-1]:
            shaped = keep_top_k(shaped, sampling.top_k)
        if sampling.top_p < 1.0:
            shaped = keep_top_p(shaped, sampling.top_p)
        return keep_min_p(shaped, sampling.min_p) if sampling.min_p > 0.0 else shaped


class _Exponential(NamedTuple):
    weights: Tensor  # exp(logits - largest), [rows, vocabulary]
    largest: Tensor  # [rows, 1]
    log_sum: Tensor  # of the weights, [rows, 1]


def _exponential(logits: Tensor) -> _Exponential:
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    return _Exponential(weights, largest, weights.sum(-1, keepdim=True).log())


def _logprob(logits: Tensor, tokens: Tensor, exponential: _Exponential) -> Tensor:
    # Near the largest logit numbers are small and the difference is exact; a log-sum-exp would be rounded first.
    return (logits.gather(-1, tokens[:, None]) - exponential.largest - exponential.log_sum).squeeze(-1)


def _entropy(logits: Tensor, exponential: _Exponential) -> Tensor:
    weights, largest, log_sum = exponential
    above = torch.where(weights > 0, logits - largest, 0.0)  # minus infinity times nothing is nothing
    return log_sum.squeeze(-1) - (weights * above).sum(-1) / weights.sum(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The ``k`` largest of ``[rows, vocabulary]``, minus infinity elsewhere; equals of the smallest kept stay too."""
    smallest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most probable tokens whose mass before each is below ``p``, at least one (Holtzman et al. 2020)."""
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    outside = probability.cumsum(-1) - probability >= p
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least ``p`` times as probable as the most probable one (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def stream_key(seed: int, prompt: int, sample: int) -> int:
    """The random stream of one response: a 64-bit number that depends on these three and nothing else."""
    key = 0
    for part in (seed, prompt, sample):
        key = _mixed((key ^ _mixed(part % _WORD)) + (_GAMMA % _WORD))
    return key - _WORD if key >= _WORD // 2 else key


def _mixed(x: int) -> int:
    x %= _WORD
    x = (x ^ (x >> 30)) * (_MIX_1 % _WORD) % _WORD
    x = (x ^ (x >> 27)) * (_MIX_2 % _WORD) % _WORD
    return x ^ (x >> 31)


def uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """The number in (0, 1) at position ``counters`` of streams ``keys`` (both long ``[rows]``), ``[rows]`` float64."""
    x = keys + (counters + 1) * _GAMMA
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    x = x ^ _shifted(x, 31)
    # 48 bits: the largest number stays below 1 also when it is multiplied and rounded.
    return (_shifted(x, 16).double() + 0.5) * 2.0**-48


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Right shift that brings in zeros; torch's brings in the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def invert(weights: Tensor, at: Tensor) -> Tensor:
    """Draw by inverting the cumulative distribution: first over blocks of the vocabulary, then inside the block.

    Args:
        weights: ``[rows, vocabulary]`` float32, not negative, some positive, in any scale.
        at: ``[rows]`` float64 in (0, 1).

    Returns:
        ``[rows]`` long; never a token of weight 0.
    """
    rows, vocabulary = weights.shape
    width = 1 << (vocabulary - 1).bit_length() // 2
    if vocabulary % width:
        weights = torch.nn.functional.pad(weights, (0, width - vocabulary % width))
    blocks = weights.view(rows, -1, width)
    sums = blocks.sum(-1).double()
    block, share = _first_beyond(sums, at)
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, width)).squeeze(1).double()
    place, _ = _first_beyond(inside, share)
    return block * width + place


def _first_beyond(weights: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative share of ``weights`` first exceeds ``at``, and how far into that one ``at`` lies."""
    ends = weights.cumsum(-1)
    target = at * ends[:, -1]
    place = (ends <= target[:, None]).sum(-1).clamp_max(weights.shape[-1] - 1)
    weight = weights.gather(-1, place[:, None]).squeeze(-1)
    begin = ends.gather(-1, place[:, None]).squeeze(-1) - weight
    return place, ((target - begin) / weight).clamp(0.0, 1.0 - 2.0**-40)
