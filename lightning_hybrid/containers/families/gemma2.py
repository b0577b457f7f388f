"""Gemma 2: norms before and after each block, soft-capped scores, every other layer with a sliding window."""

from typing import Any

from lightning_hybrid.containers.family import Family, Norms

GEMMA_NORMS = Norms(
    attention_in="input_layernorm",
    attention_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)


def bidirectional(config: Any) -> str | None:
    """Gemma's embedding models look ahead; a KV cache cannot."""
    return "its attention is bidirectional" if getattr(config, "use_bidirectional_attention", None) else None


GEMMA2 = Family(norms=GEMMA_NORMS, unit_offset=True, window="by_type", unsupported=bidirectional)
