"""Inference containers: views of a trained causal LM that run it token by token over a KV cache, copying nothing."""

from __future__ import annotations

from typing import Any

from lightning_hybrid.containers.attention import Decode, Prefill, Scores
from lightning_hybrid.containers.cache import KVCache, rounded
from lightning_hybrid.containers.decoder import Decoder
from lightning_hybrid.containers.families import FAMILIES, Family
from lightning_hybrid.containers.layout import lay_out, order_parameters, units
from lightning_hybrid.containers.support import reason_without_container, refuse_without_container
from lightning_hybrid.containers.weights import Cut, InPlace, Shard, Weights
from lightning_hybrid.models import base_of

__all__ = [
    "FAMILIES",
    "Cut",
    "Decode",
    "Decoder",
    "Family",
    "InPlace",
    "KVCache",
    "Prefill",
    "Scores",
    "Shard",
    "Weights",
    "bind",
    "lay_out",
    "order_parameters",
    "reason_without_container",
    "refuse_without_container",
    "rounded",
    "units",
]


def bind(model: Any, positions: int, weights: Weights | None = None, shard: Shard | None = None) -> Decoder:
    """The inference view of a causal LM, with peft's adapters if it has any.

    Args:
        model: a Hugging Face causal LM, or peft's model around one.
        positions: how many positions will be used at most.
        weights: where parameters' values are; by default in the parameters.
        shard: this rank's share; by default all.

    Raises:
        RolloutError: if there is no container for it; :func:`reason_without_container` says so beforehand.
    """
    refuse_without_container(model, positions)
    base = base_of(model)
    return Decoder(base, FAMILIES[base.config.model_type], positions, weights, shard)
