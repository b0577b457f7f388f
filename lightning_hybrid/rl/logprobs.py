"""Log-probabilities and entropy from logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.rl.masking import widen


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token under its logits, in float32 or higher.

    Args:
        logits: Float[..., V].
        tokens: Long[...], ids below V.

    Returns:
        Float[...], in nats.

    Raises:
        ValueError: The shape of ``tokens`` is not that of ``logits`` without the last dimension, or they are not int64.
    """
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(f"tokens has shape {list(tokens.shape)}, allowed is {list(logits.shape[:-1])}: one per row")
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens has dtype {tokens.dtype}, allowed is torch.int64")
    return F.log_softmax(widen(logits), dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the distribution over the last dimension; tokens with a logit of -inf contribute 0.

    Args:
        logits: Float[..., V]; at least one finite logit in each row.

    Returns:
        Float[...], in nats, in float32 or higher.
    """
    logprobs = F.log_softmax(widen(logits), dim=-1)
    # 0 * -inf would be NaN, in the value and in the gradient.
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(logprobs.exp() * finite).sum(-1)
