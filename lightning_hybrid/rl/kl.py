"""Per-token estimates of the KL divergence from samples (Schulman 2020, "Approximating KL Divergence")."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hybrid.rl.masking import widen

KL_ESTIMATORS = ("k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0


def clamped_log_ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    """Returns ``logprobs - other`` in float32 or higher, clamped to ±20 so that its exponential stays finite."""
    return (widen(logprobs) - widen(other)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates KL(policy ‖ reference) for each token that the policy sampled.

    With ``d = logprobs - ref_logprobs``, clamped to ±20: k1 is ``d`` (unbiased, may be negative), k2 is ``d² / 2``
    (biased, never negative), k3 is ``exp(-d) - 1 + d`` (unbiased, never negative).

    Args:
        logprobs: Float, any shape; log-probabilities of the tokens under the policy that sampled them.
        ref_logprobs: Float, the same shape; under the reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        Float, the same shape, in nats.

    Raises:
        ValueError: Unknown estimator, or the shapes differ.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"ref_logprobs has shape {list(ref_logprobs.shape)}, allowed is {list(logprobs.shape)}")
    d = clamped_log_ratio(logprobs, ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"estimator is {estimator!r}, allowed are {', '.join(KL_ESTIMATORS)}")
