"""Adapters on models that are not there."""

from __future__ import annotations

from typing import Any

from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.models.adapters import adapter_settings, wrapped

# NF4 (Dettmers et al. 2023): four bits; for each 64 weights a scale of eight bits, for each 256 scales one of 32.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8


def adapted(model: Any, config: AdapterConfig | None) -> Any:
    """A model without memory, with an adapter if there is one; as :func:`lightning_hybrid.models.add_adapter` does it.

    That one also takes a fingerprint of the weights, which have no values here.
    """
    return model if config is None else wrapped(model, adapter_settings(model, config))
