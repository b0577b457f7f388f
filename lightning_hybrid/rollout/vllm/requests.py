"""From prompts to vLLM's requests, and from its answers to a rollout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import Rollout, SamplingParams, pad_left


def sampling_of(vllm: Any, sampling: SamplingParams, seed: int, indices: Sequence[int]) -> list[Any]:
    """How each response is drawn, those of a prompt together: each from a random stream of its own.

    A stream follows from the seed, the prompt's index and the sample's number, whatever the rank or the batch.
    """
    return [
        vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            stop_token_ids=list(sampling.eos_ids or ()),
            ignore_eos=True,  # what ends a response is said here, not in the model's folder
            seed=_stream(seed, index, sample),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )
        for index in indices
        for sample in range(sampling.n)
    ]


def _stream(seed: int, index: int, sample: int) -> int:
    """A seed that no two responses share but by chance; Python's own hash of small numbers has too few bits."""
    digest = hashlib.blake2b(f"{seed} {index} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rollout_of(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Any], eos_ids: Sequence[int], pad: int, device: torch.device
) -> Rollout:
    """One row for each answer.

    Log-probs are those under the distribution that was drawn from, in both places: vLLM tells one kind only.

    Args:
        prompts: of the answers, each as often as it has answers.
        outputs: of vLLM, in their order, with one answer each.
        eos_ids: that end a response.
        pad: to pad with.
        device: of the rollout.

    Raises:
        RolloutError: where vLLM gave no answer, or cut one off.
    """
    answers = [output.outputs[0] for output in outputs]
    for row, answer in enumerate(answers):
        if not answer.token_ids or answer.finish_reason not in ("stop", "length"):
            raise RolloutError(
                f"vLLM ended response {row} after {len(answer.token_ids)} tokens by {answer.finish_reason!r}"
            )
    tokens, mask = pad_left(prompts, pad, device)
    response = _padded([list(answer.token_ids) for answer in answers], pad, device)
    lengths = torch.tensor([len(answer.token_ids) for answer in answers], device=device)
    responded = torch.arange(response.shape[1], device=device) < lengths[:, None]
    logprobs = _padded([_logprobs(answer) for answer in answers], 0.0, device)
    logprobs = torch.cat([torch.zeros_like(mask, dtype=torch.float32), logprobs], 1)
    return Rollout(
        tokens=torch.cat([tokens, response], 1),
        prompt_mask=torch.cat([mask, torch.zeros_like(responded)], 1),
        response_mask=torch.cat([torch.zeros_like(mask), responded], 1),
        policy_logprobs=logprobs,
        sampling_logprobs=logprobs,
        finish_reasons=tuple("eos" if answer.token_ids[-1] in eos_ids else "length" for answer in answers),
    )


def _logprobs(answer: Any) -> list[float]:
    return [chosen[token].logprob for token, chosen in zip(answer.token_ids, answer.logprobs, strict=True)]


def _padded(rows: list[list[Any]], fill: float, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)
