"""What a rollout hands on: prompts, responses, and how probable the responses were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

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
            temperature, top-k and the like).
        finish_reasons: per row ``"eos"``, ``"length"`` or ``"stop"`` (a stop text was completed).
        entropies: ``[batch, time]`` float32, nats, of the raw policy at each sampled token, 0 elsewhere; None where
            they were not asked for.
        versions: ``[batch, time]`` long, the version of the weights that drew each response token, 0 elsewhere; None
            where all are of now.
    """

    tokens: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    policy_logprobs: Tensor
    sampling_logprobs: Tensor
    finish_reasons: tuple[str, ...]
    entropies: Tensor | None = None
    versions: Tensor | None = None

    def rows(self, begin: int, end: int) -> Rollout:
        """Rows ``begin`` to ``end``, less the columns that are padding in all of them."""
        columns = used_columns(self.attention_mask[begin:end])
        kept = self._with(lambda tensor: tensor[begin:end, columns])
        return replace(kept, finish_reasons=self.finish_reasons[begin:end])

    def pick(self, index: Sequence[int]) -> Rollout:
        """The rows of these numbers, in this order, with all columns."""
        kept = self._with(lambda tensor: tensor[list(index)])
        return replace(kept, finish_reasons=tuple(self.finish_reasons[row] for row in index))

    def usable_in_training(self) -> Rollout:
        """The same rollout in tensors that autograd accepts, where these were made in inference mode."""
        return self._with(Tensor.clone)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Rollout:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

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
        """``[batch]`` bool, True where the response ended by itself, with EOS or a stop text."""
        return torch.tensor([reason != "length" for reason in self.finish_reasons], device=self.tokens.device)

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


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """All rows of several rollouts, padded so that every response begins in the same column.

    Raises:
        ValueError: for no rollouts.
    """
    if not rollouts:
        raise ValueError("there are no rollouts to join: give at least one")
    before = max(_begin(rollout) for rollout in rollouts)
    after = max(rollout.tokens.shape[1] - _begin(rollout) for rollout in rollouts)

    def padded(rollout: Rollout) -> Rollout:
        begin = _begin(rollout)
        sides = (before - begin, after - (rollout.tokens.shape[1] - begin))
        return rollout._with(lambda tensor: torch.nn.functional.pad(tensor, sides))

    parts = [padded(rollout) for rollout in rollouts]
    held = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Rollout)}
    joined: dict[str, Any] = {name: torch.cat(v) for name, v in held.items() if isinstance(v[0], Tensor)}
    reasons = sum((part.finish_reasons for part in parts), ())
    return Rollout(**joined, finish_reasons=reasons)


def _begin(rollout: Rollout) -> int:
    """The column in which responses begin."""
    return int(rollout.response_mask.any(0).nonzero()[0])


def used_columns(mask: Tensor) -> slice:
    """From the first to the last column of ``mask`` ``[batch, time]`` that is True anywhere."""
    used = mask.any(0).nonzero().flatten()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


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


def lay_out(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad prompts on the left and their responses on the right.

    Args:
        prompts: token ids, at least one each.
        responses: the same, to each of them.
        pad: id to pad with.
        device: where the tensors go.

    Returns:
        ``[batch, time]`` long tokens, and the bool masks of prompts and of responses.
    """
    before, prompted = pad_left(prompts, pad, device)
    backwards, responded = pad_left([response[::-1] for response in responses], pad, device)
    of_prompts = torch.cat([prompted, torch.zeros_like(responded)], 1)
    of_responses = torch.cat([torch.zeros_like(prompted), responded.flip(1)], 1)
    return torch.cat([before, backwards.flip(1)], 1), of_prompts, of_responses


def in_place(values: Sequence[Sequence[float]], mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of each row where its mask is, ``[batch, time]`` of ``dtype``, and 0 elsewhere.

    Args:
        values: as many of a row as its mask has True.
        mask: ``[batch, time]`` bool.
        dtype: of the result.
    """
    flat = torch.tensor([value for row in values for value in row], dtype=dtype, device=mask.device)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter(mask, flat)
