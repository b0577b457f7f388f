"""Which models a container can run, and why it cannot run the others."""

from __future__ import annotations

from typing import Any

from lightning_hybrid.containers.families import FAMILIES
from lightning_hybrid.containers.layer import find
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.models import base_of


def reason_without_container(model: Any, positions: int) -> str | None:
    """Why no container can run ``model`` over ``positions`` positions; None where one can."""
    base = base_of(model)
    config = getattr(base, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or config is None:
        return f"model type {getattr(config, 'model_type', None)!r} has none (those that have: {', '.join(FAMILIES)})"
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        return "it has no language-modelling head"
    return family.unsupported(config) or _rotary_reason(config, positions) or _adapter_reason(model)


def refuse_without_container(model: Any, positions: int) -> None:
    """Raise where no container can run ``model`` over ``positions`` positions.

    Raises:
        RolloutError: with the reason.
    """
    reason = reason_without_container(model, positions)
    if reason is not None:
        raise RolloutError(f"{type(base_of(model)).__name__} has no inference container: {reason}")


def _rotary_reason(config: Any, positions: int) -> str | None:
    """Frequencies that depend on the length of the text hold up to the length the model was first trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    for kind in kinds:
        limit = _fixed_up_to(config, kind)
        if limit is not None and positions > limit:
            return f"its {kind['rope_type']} rotary frequencies change beyond {limit} tokens, and {positions} are asked"
    return None


def _fixed_up_to(config: Any, rope: dict[str, Any]) -> int | None:
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings")
        return int(original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
    return int(config.max_position_embeddings) if rope.get("rope_type") == "dynamic" else None


def _adapter_reason(model: Any) -> str | None:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter is a learned prompt"
    for name, module in base_of(model).named_modules():
        if not hasattr(module, "base_layer"):
            continue
        reason = _layer_reason(module)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _layer_reason(layer: Any) -> str | None:
    if not hasattr(layer, "lora_A"):
        return f"its adapter {type(layer).__name__} is not LoRA"
    if any(layer.use_dora.values()):
        return "its LoRA adapter is weight-decomposed (DoRA)"
    if len(getattr(layer, "lora_embedding_A", ())):
        return "its LoRA adapter is on an embedding"
    if any(getattr(layer, "lora_bias", {}).values()):
        return "its LoRA adapter has a bias"
    if not find(layer, "base_layer.weight").is_floating_point():
        return "its base weights are quantized"
    return None
