"""GPT-2: learned positions, q, k and v in one transposed projection."""

from typing import Any

from lightning_hybrid.containers.family import Family, Norms


def _unsupported(config: Any) -> str | None:
    return "it has cross-attention" if config.add_cross_attention else None


GPT2 = Family(
    trunk="transformer",
    embedding="wte",
    position_embedding="wpe",
    rotary=None,
    layers="h",
    final_norm="ln_f",
    attention="attn",
    qkv=("c_attn",),
    attention_out="c_proj",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    activation="mlp.act",
    gated=False,
    norms=Norms(attention_in="ln_1", mlp_in="ln_2"),
    unsupported=_unsupported,
)
