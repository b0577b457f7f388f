"""What an algorithm is given to judge, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hybrid.rl import token_rewards


@dataclass(frozen=True)
class Judged:
    """Responses of one rank with their scores; responses to one prompt are all on the same rank.

    Attributes:
        scores: ``[batch]`` float32, one per response.
        group: ``[batch]`` long, equal for responses to the same prompt.
        mask: ``[batch, time]`` bool, True on response tokens.
        logprobs: ``[batch, time]`` float32, under the policy that sampled.
        ref_logprobs: ``[batch, time]`` float32, under the frozen reference; None where there is none.
        values: ``[batch, time]`` float32, the critic's; None where there is none.
        kl_coef: price of a nat in the rewards; 0 where the KL is charged elsewhere.
        sum_over_ranks: adds a small tensor up over all ranks.
    """

    scores: Tensor
    group: Tensor
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    kl_coef: float
    sum_over_ranks: Callable[[Tensor], Tensor]

    def token_rewards(self, clip: float | None = None) -> Tensor:
        """KL penalty on every token and score on the last, ``[batch, time]``: `token_rewards` of these responses."""
        reference = self.logprobs if self.ref_logprobs is None else self.ref_logprobs
        return token_rewards(self.scores, self.logprobs, reference, self.mask, self.kl_coef, clip)

    def on_tokens(self, of_sequences: Tensor) -> Tensor:
        """Values of responses ``[batch]`` on each of their tokens, ``[batch, time]``, 0 elsewhere."""
        return torch.where(self.mask, of_sequences[:, None], of_sequences.new_zeros(()))


@dataclass(frozen=True)
class Credit:
    """What each sampled token is credited with.

    Attributes:
        rewards: ``[batch, time]`` float32.
        advantages: ``[batch, time]`` float32.
        returns: ``[batch, time]`` float32, what the critic should have said; None without a critic.
    """

    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None = None
