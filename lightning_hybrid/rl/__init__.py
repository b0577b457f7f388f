"""Pure tensor maths of RLHF, free of any framework.

Tensors are ``[batch, time]`` unless said otherwise, and True in a mask always means "counts". Masked positions may hold
anything, NaN included: they reach neither a value nor a gradient. float64 stays float64; float16 and bfloat16 are
computed, and returned, in float32.
"""

from __future__ import annotations

from lightning_hybrid.rl.advantages import GROUP_KINDS, discounted_returns, gae, group_advantages, token_rewards
from lightning_hybrid.rl.aggregation import AGGREGATIONS, aggregate
from lightning_hybrid.rl.kl import KL_ESTIMATORS, estimate_kl
from lightning_hybrid.rl.logprobs import entropy, gather_logprobs
from lightning_hybrid.rl.losses import preference_loss, value_loss
from lightning_hybrid.rl.masking import masked_mean, whiten
from lightning_hybrid.rl.mismatch import logprob_gap, truncated_importance_weights
from lightning_hybrid.rl.policy import cispo_loss, policy_loss
from lightning_hybrid.rl.preference import (
    PREFERENCE_KINDS,
    kto_baseline,
    kto_loss,
    preference_optimization_loss,
    sequence_logprobs,
)
from lightning_hybrid.rl.running import (
    ERROR_LIMIT,
    AdaptiveKLController,
    FixedKLController,
    KLController,
    RunningMoments,
    moments,
)

__all__ = [
    "AGGREGATIONS",
    "ERROR_LIMIT",
    "GROUP_KINDS",
    "KL_ESTIMATORS",
    "PREFERENCE_KINDS",
    "AdaptiveKLController",
    "FixedKLController",
    "KLController",
    "RunningMoments",
    "aggregate",
    "cispo_loss",
    "discounted_returns",
    "entropy",
    "estimate_kl",
    "gae",
    "gather_logprobs",
    "group_advantages",
    "kto_baseline",
    "kto_loss",
    "logprob_gap",
    "masked_mean",
    "moments",
    "policy_loss",
    "preference_loss",
    "preference_optimization_loss",
    "sequence_logprobs",
    "token_rewards",
    "truncated_importance_weights",
    "value_loss",
    "whiten",
]
