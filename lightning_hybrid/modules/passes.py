"""Forward passes over a rollout, a micro-batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hybrid.generation import used_columns
from lightning_hybrid.models import AdaptersOff, Policy, ScalarModel
from lightning_hybrid.modules.batching import micro_batches
from lightning_hybrid.rollout import Rollout


def policy_logprobs(
    policy: Policy | AdaptersOff, rollout: Rollout, micro_batch_size: int, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the sampled tokens, ``[batch, time]`` float32, 0 outside the responses."""
    masks = rollout.attention_mask, rollout.response_mask
    return token_logprobs(policy, rollout.tokens, *masks, micro_batch_size, temperature)


@torch.no_grad()
def token_logprobs(
    policy: Policy | AdaptersOff,
    tokens: Tensor,
    attention: Tensor,
    response: Tensor,
    micro_batch_size: int,
    temperature: float,
) -> Tensor:
    """Log-probs of the tokens that ``response`` marks, ``[batch, time]`` float32, 0 elsewhere.

    Args:
        policy: whose.
        tokens: ``[batch, time]`` long.
        attention: ``[batch, time]`` bool, True on real tokens.
        response: ``[batch, time]`` bool.
        micro_batch_size: rows computed together.
        temperature: that logits are divided by.
    """
    result = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    for rows in micro_batches(attention, micro_batch_size):
        columns = used_columns(attention[rows])
        output = policy(
            tokens[rows, columns], attention[rows, columns], response[rows, columns], temperature=temperature
        )
        result[rows, columns] = output.logprobs
    return result


@torch.no_grad()
def critic_values(critic: ScalarModel, rollout: Rollout, micro_batch_size: int) -> Tensor:
    """What the critic says at each token, ``[batch, time]`` float32, 0 where everything is padding."""
    attention = rollout.attention_mask
    result = torch.zeros_like(rollout.policy_logprobs)
    for rows in micro_batches(attention, micro_batch_size):
        columns = used_columns(attention[rows])
        result[rows, columns] = critic(rollout.tokens[rows, columns], attention[rows, columns])
    return result
