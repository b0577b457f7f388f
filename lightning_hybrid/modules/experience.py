"""What PPO learns from: a rollout with scores, log-probs, values, rewards and advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_hybrid.generation import used_columns


@dataclass(frozen=True)
class Experience:
    """One rank's share of an iteration. All ``[batch, time]`` tensors are 0 where ``mask`` is False.

    Attributes:
        tokens: ``[batch, time]`` long, left-padded prompts and right-padded responses.
        attention_mask: ``[batch, time]`` bool, True on real tokens.
        mask: ``[batch, time]`` bool, True on response tokens: what is trained on.
        scores: ``[batch]`` float32, one per response, as they entered the token rewards.
        old_logprobs: ``[batch, time]`` float32, under the policy that sampled.
        ref_logprobs: ``[batch, time]`` float32, under the frozen reference.
        values: ``[batch, time]`` float32, the critic's value of the state before each token.
        rewards: ``[batch, time]`` float32, KL penalty on every token, score on the last.
        advantages: ``[batch, time]`` float32.
        returns: ``[batch, time]`` float32, what the critic should have said.
        weights: ``[batch, time]`` float32, factors of the policy's token losses; None where there are none.
    """

    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    scores: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> Experience:
        """The rows ``index`` (long ``[n]``), less the columns that are padding in all of them."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        picked = {name: tensor[index] for name, tensor in held.items() if tensor is not None}
        columns = used_columns(picked["attention_mask"])
        return Experience(**{k: v if v.dim() == 1 else v[:, columns] for k, v in picked.items()})


def micro_batches(mask: Tensor, micro_batch_size: int) -> Iterator[Tensor]:
    """Cut the rows of ``mask`` ``[batch, time]`` into index tensors of at most ``micro_batch_size``.

    Rows of like width, by where their real tokens begin and end, come together: less padding is computed.
    """
    time = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, time, mask.shape[1]).amin(1)
    last = torch.where(mask, time, -1).amax(1)
    order = torch.argsort(last * (mask.shape[1] + 1) - first, stable=True)
    yield from order.cpu().split(micro_batch_size)  # it indexes rows chosen on the host


def minibatches(size: int, minibatch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Cut ``size`` rows at random into minibatches; one that holds them all keeps their order."""
    order = torch.arange(size) if minibatch_size >= size else torch.randperm(size, generator=generator)
    return list(order.split(minibatch_size))


def state_values(values: Tensor, mask: Tensor) -> Tensor:
    """Align a critic's output with the tokens: the value before token ``t`` is what the critic says at ``t - 1``."""
    shifted = torch.roll(values, 1, dims=1)
    return shifted.masked_fill(~mask, 0.0)
