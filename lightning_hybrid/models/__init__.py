"""The models of the house: a policy that answers with log-probs, and a trunk with a scalar head."""

from lightning_hybrid.models.adapters import AdaptersOff, add_adapter, has_adapter, with_adapter
from lightning_hybrid.models.loading import (
    build_policy,
    disable_dropout,
    end_of_text_ids,
    end_of_turn_id,
    load_policy,
    load_scalar,
    load_tokenizer,
    max_positions,
    set_dropout,
)
from lightning_hybrid.models.policy import Policy, PolicyOutput, base_of, scaled_logits
from lightning_hybrid.models.scalar import ScalarModel, last_value, scalar_from_policy

__all__ = [
    "AdaptersOff",
    "Policy",
    "PolicyOutput",
    "ScalarModel",
    "add_adapter",
    "base_of",
    "build_policy",
    "disable_dropout",
    "end_of_text_ids",
    "end_of_turn_id",
    "has_adapter",
    "last_value",
    "load_policy",
    "load_scalar",
    "load_tokenizer",
    "max_positions",
    "scalar_from_policy",
    "scaled_logits",
    "set_dropout",
    "with_adapter",
]
