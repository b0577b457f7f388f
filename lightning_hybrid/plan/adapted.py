"""Adapters on models that are not there."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.models.adapters import wrapped

# NF4 (Dettmers et al. 2023): four bits; for each 64 weights a scale of eight bits, for each 256 scales one of 32.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def adapted(model: Any, config: AdapterConfig | None) -> Any:
    """A model without memory, with an adapter if there is one; as :func:`lightning_hybrid.models.add_adapter` does it.

    That one also takes a fingerprint of the weights, which have no values here.
    """
    if config is None:
        return model
    import peft

    scalar = isinstance(getattr(model, "score", None), nn.Linear)
    settings = peft.LoraConfig(
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        r=config.r,
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        target_modules=config.target_modules,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    return wrapped(model, settings)
