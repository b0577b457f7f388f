"""The models of the house: a policy that answers with log-probs, and a trunk with a scalar head."""

from lightning_hybrid.models.loading import (
    build_policy,
    disable_dropout,
    end_of_text_ids,
    load_policy,
    load_scalar,
    load_tokenizer,
    max_positions,
)
from lightning_hybrid.models.policy import Policy, PolicyOutput, base_of, scaled_logits
from lightning_hybrid.models.scalar import ScalarModel, last_value

__all__ = [
    "Policy",
    "PolicyOutput",
    "ScalarModel",
    "base_of",
    "build_policy",
    "disable_dropout",
    "end_of_text_ids",
    "last_value",
    "load_policy",
    "load_scalar",
    "load_tokenizer",
    "max_positions",
    "scaled_logits",
]
