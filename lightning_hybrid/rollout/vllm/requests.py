"""From prompts to vLLM's requests, and from its answers to a rollout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import Rollout, SamplingParams, in_place, lay_out


@dataclass(frozen=True)
class Draw:
    """How one response is drawn.

    Attributes:
        sampling: of its rollout.
        seed: of its rollout.
        index: of its prompt, over all ranks.
        sample: its number among the responses to that prompt.
    """

    sampling: SamplingParams
    seed: int
    index: int
    sample: int

    def stream(self, drawn: int = 0) -> int:
        """The seed of its random stream, that no two responses share but by chance.

        Python's own hash of small numbers has too few bits.

        Args:
            drawn: tokens after which it goes on with a stream of its own, as vLLM cannot with the one of before.
        """
        words = [self.seed, self.index, self.sample, *([drawn] if drawn else [])]
        digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def how_to_draw(vllm: Any, draw: Draw, drawn: int = 0) -> Any:
    """As vLLM's own parameters.

    Args:
        vllm: the module.
        draw: of the response.
        drawn: tokens that it has already, which are handed to vLLM as a part of the prompt.
    """
    sampling = draw.sampling
    return vllm.SamplingParams(
        max_tokens=sampling.max_new_tokens - drawn,
        min_tokens=max(0, sampling.min_new_tokens - drawn),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        stop_token_ids=list(sampling.eos_ids or ()),
        ignore_eos=True,  # what ends a response is said here, not in the model's folder
        seed=draw.stream(drawn),
        logprobs=0,  # of the sampled token alone
        detokenize=False,
    )


def sampling_of(vllm: Any, sampling: SamplingParams, seed: int, indices: Sequence[int]) -> list[Any]:
    """How each response is drawn, those of a prompt together: each from a random stream of its own.

    A stream follows from the seed, the prompt's index and the sample's number, whatever the rank or the batch.
    """
    samples = range(sampling.n)
    return [how_to_draw(vllm, Draw(sampling, seed, index, sample)) for index in indices for sample in samples]


@dataclass
class Response:
    """What an engine drew to one prompt.

    Attributes:
        tokens: ids.
        logprobs: of them under the distribution that was drawn from, nats.
        versions: of the weights that drew them.
        ended: why, in vLLM's words; None while it is not finished.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    ended: str | None = None


def rollout_of(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Any], eos_ids: Sequence[int], pad: int, device: torch.device
) -> Rollout:
    """One row for each of vLLM's finished outputs, which have one answer each; see :func:`rollout_from`."""
    answers = [output.outputs[0] for output in outputs]
    responses = [Response(list(answer.token_ids), logprobs_of(answer), [], answer.finish_reason) for answer in answers]
    return rollout_from(prompts, responses, eos_ids, pad, device)


def logprobs_of(answer: Any) -> list[float]:
    """Of the tokens of an answer of vLLM, nats."""
    return [chosen[token].logprob for token, chosen in zip(answer.token_ids, answer.logprobs or (), strict=True)]


def rollout_from(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    eos_ids: Sequence[int],
    pad: int,
    device: torch.device,
    versions: bool = False,
) -> Rollout:
    """One row for each response.

    Log-probs are those under the distribution that was drawn from, in both places: vLLM tells one kind only.

    Args:
        prompts: of the responses, each as often as it has responses.
        responses: in their order.
        eos_ids: that end a response.
        pad: to pad with.
        device: of the rollout.
        versions: tell of each token which weights drew it.

    Raises:
        RolloutError: where vLLM gave no answer, or cut one off.
    """
    for row, answer in enumerate(responses):
        if not answer.tokens or answer.ended not in ("stop", "length"):
            raise RolloutError(f"vLLM ended response {row} after {len(answer.tokens)} tokens by {answer.ended!r}")
    tokens, prompted, responded = lay_out(prompts, [answer.tokens for answer in responses], pad, device)
    logprobs = in_place([answer.logprobs for answer in responses], responded, torch.float32)
    drawn_by = in_place([answer.versions for answer in responses], responded, torch.long) if versions else None
    return Rollout(
        tokens=tokens,
        prompt_mask=prompted,
        response_mask=responded,
        policy_logprobs=logprobs,
        sampling_logprobs=logprobs,
        finish_reasons=tuple("eos" if answer.tokens[-1] in eos_ids else "length" for answer in responses),
        versions=drawn_by,
    )
