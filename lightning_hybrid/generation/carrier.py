"""What a rollout hands on: prompts, responses, and how probable the responses were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled responses, one per row.

    Prompts are padded on the left and responses on the right, so that every response begins in the same column. This
    is the only place where padding is decided; whoever reads a rollout reads the masks.

    With prompts ``[5, 6]`` and ``[7]`` and responses ``[8, 2]`` and ``[9, 9, 2]`` (2 is EOS, 0 padding)::

        tokens         5 6 8 2 0      prompt_mask    1 1 0 0 0      response_mask  0 0 1 1 0
                       0 7 9 9 2                     0 1 0 0 0                     0 0 1 1 1

    Attributes:
        tokens: ``[batch, time]`` long.
        prompt_mask: ``[batch, time]`` bool, True on prompt tokens.
        response_mask: ``[batch, time]`` bool, True on sampled tokens, the EOS included.
        policy_logprobs: ``[batch, time]`` float32, log-probs of the sampled tokens under the raw policy; 0 elsewhere.
        sampling_logprobs: ``[batch, time]`` float32, the same under the distribution they were drawn from (after
            temperature, top-k and top-p).
        finish_reasons: per row ``"eos"`` or ``"length"``.
    """

    tokens: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    policy_logprobs: Tensor
    sampling_logprobs: Tensor
    finish_reasons: tuple[str, ...]

    @property
    def attention_mask(self) -> Tensor:
        """``[batch, time]`` bool, True on every real token."""
        return self.prompt_mask | self.response_mask

    @property
    def lengths(self) -> Tensor:
        """``[batch]`` long: sampled tokens per row."""
        return self.response_mask.sum(-1)

    @property
    def finished(self) -> Tensor:
        """``[batch]`` bool, True where the response ended with EOS."""
        return torch.tensor([reason == "eos" for reason in self.finish_reasons], device=self.tokens.device)

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts' token ids, without padding."""
        return _ragged(self.tokens, self.prompt_mask)

    @property
    def responses(self) -> list[list[int]]:
        """The responses' token ids, without padding, the EOS included."""
        return _ragged(self.tokens, self.response_mask)

    @property
    def logprobs(self) -> list[list[float]]:
        """The sampled tokens' log-probs under the raw policy, without padding."""
        return _ragged(self.policy_logprobs, self.response_mask)


def _ragged(values: Tensor, mask: Tensor) -> list[list]:  # type: ignore[type-arg]
    return [row[kept].tolist() for row, kept in zip(values, mask, strict=True)]


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left.

    Args:
        prompts: token ids, at least one each.
        pad: id to pad with; any will do, the mask decides.
        device: where the tensors go.

    Returns:
        ``[batch, time]`` long tokens and bool mask.
    """
    longest = max(len(prompt) for prompt in prompts)
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
