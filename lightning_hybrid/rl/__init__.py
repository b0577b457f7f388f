"""Pure tensor maths of RLHF, free of any framework.

Tensors are ``[batch, time]`` unless said otherwise, and True in a mask always means "counts". Masked positions may hold
anything, NaN included: they reach neither a value nor a gradient. float64 stays float64; float16 and bfloat16 are
computed, and returned, in float32.
"""

from __future__ import annotations

from lightning_hybrid.rl.advantages import gae, token_rewards
from lightning_hybrid.rl.kl import KL_ESTIMATORS, estimate_kl
from lightning_hybrid.rl.logprobs import entropy, gather_logprobs
from lightning_hybrid.rl.losses import AGGREGATIONS, aggregate, policy_loss, preference_loss, value_loss
from lightning_hybrid.rl.masking import masked_mean, whiten
from lightning_hybrid.rl.mismatch import logprob_gap, truncated_importance_weights
from lightning_hybrid.rl.running import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    RunningMoments,
    moments,
)

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "AdaptiveKLController",
    "FixedKLController",
    "KLController",
    "RunningMoments",
    "aggregate",
    "entropy",
    "estimate_kl",
    "gae",
    "gather_logprobs",
    "logprob_gap",
    "masked_mean",
    "moments",
    "policy_loss",
    "preference_loss",
    "token_rewards",
    "truncated_importance_weights",
    "value_loss",
    "whiten",
]
