"""OPT: learned positions from 2 on, LayerNorm before each block, or after each sum (OPT-350m)."""

from typing import Any

from lightning_hybrid.containers.family import Family, Norms


def _norms(config: Any) -> Norms:
    attention, mlp = "self_attn_layer_norm", "final_layer_norm"
    if config.do_layer_norm_before:
        return Norms(attention_in=attention, mlp_in=mlp)
    return Norms(attention_sum=attention, mlp_sum=mlp)


OPT = Family(
    trunk="model.decoder",
    position_embedding="embed_positions",
    position_offset=2,
    project_in="project_in",
    project_out="project_out",
    rotary=None,
    final_norm="final_layer_norm",
    attention_out="out_proj",
    mlp_in=("fc1",),
    mlp_out="fc2",
    activation="activation_fn",
    gated=False,
    norms=_norms,
)
