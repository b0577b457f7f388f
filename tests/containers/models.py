"""Tiny models of every family that has a container, in the variants that it knows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_hybrid.containers import FAMILIES

COMMON = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama, one key-value head, biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, linear": _rope("linear", factor=2.0),
    "llama, dynamic": _rope("dynamic", factor=2.0),
    "llama, llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "llama, yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "mistral, window": {"num_key_value_heads": 2, "sliding_window": 5},
    "mistral, no window": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2, windows": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 64},
    "phi3, window": {"num_key_value_heads": 2, "sliding_window": 6, "original_max_position_embeddings": 64},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 1.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "opt, projected, norm after": {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False},
    "opt, no biases": {"word_embed_proj_dim": 32, "ffn_dim": 64, "enable_bias": False},
    "gpt_neox": {},
    "gpt_neox, serial": {"use_parallel_residual": False},
    "gpt2": {},
    "bloom": {},
    "bloom, six heads": {"num_attention_heads": 6, "hidden_size": 48},
}


# The first variant of each family.
ONE_OF_EACH = [next(name for name in VARIANTS if name.split(",")[0] == kind) for kind in FAMILIES]


def variant(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """A model without neutral norms, biases or scores, so that nothing can be left out unnoticed."""
    torch.manual_seed(0)
    settings = COMMON | VARIANTS[name]
    config = AutoConfig.for_model(name.split(",")[0], **settings)
    model = AutoModelForCausalLM.from_config(config, **({"attn_implementation": attention} if attention else {}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(std=0.3, generator=generator)
        else:
            parameter.data.mul_(8)  # fresh models attend evenly, and would not show a window
    return model.to(dtype).eval()
