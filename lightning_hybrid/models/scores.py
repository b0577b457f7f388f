"""Log-probs and entropies of tokens from their logits, as one step of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokenScores(torch.autograd.Function):
    """``(logits, targets) → (log-probs, entropies)`` that keeps one tensor of the size of the logits, not four.

    With p = softmax(logits), H the entropy and y the target, the gradients are ∂ log p_y / ∂ logits = onehot(y) - p and
    ∂H / ∂ logits = -p · (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Score.

        Args:
            ctx: autograd's.
            logits: ``[tokens, vocabulary]`` float32; overwritten.
            targets: ``[tokens]`` long.

        Returns:
            Log-probs of the targets and entropies in nats, ``[tokens]`` each.
        """
        above = logits.sub_(logits.amax(-1, keepdim=True))
        chosen = above.gather(-1, targets[:, None])
        weights = above.exp()
        total = weights.sum(-1, keepdim=True)
        # Minus infinity times nothing would not be nothing.
        expected = above.clamp_(min=-1e30).mul_(weights).sum(-1, keepdim=True) / total
        log_total = total.log()
        entropy = log_total - expected
        ctx.save_for_backward(weights.div_(total), entropy, targets)
        ctx.set_materialize_grads(False)
        return (chosen - log_total).squeeze(-1), entropy.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        """From gradients of log-probs and entropies, ``[tokens]`` each or None, to those of the logits."""
        of_logprobs, of_entropy = gradients
        probabilities, entropy, targets = ctx.saved_tensors
        result: Tensor | None = None
        if of_logprobs is not None:
            result = probabilities * -of_logprobs[:, None]
            result.scatter_add_(-1, targets[:, None], of_logprobs[:, None])
        if of_entropy is not None:
            part = -of_entropy[:, None] * (torch.xlogy(probabilities, probabilities) + probabilities * entropy)
            result = part if result is None else result.add_(part)
        return result, None
