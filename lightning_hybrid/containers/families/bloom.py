"""BLOOM: ALiBi instead of positions, a norm on the embeddings, q, k, v of each head side by side."""

from typing import Any

from lightning_hybrid.containers.family import Family


def _unsupported(config: Any) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "its residual connection starts after the norm (apply_residual_connection_post_layernorm)"
    return None


BLOOM = Family(
    trunk="transformer",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    rotary=None,
    alibi=True,
    layers="h",
    final_norm="ln_f",
    attention="self_attention",
    scale="inv_norm_factor",
    qkv=("query_key_value",),
    interleaved=True,
    attention_out="dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    activation="mlp.gelu_impl",
    gated=False,
    unsupported=_unsupported,
)
