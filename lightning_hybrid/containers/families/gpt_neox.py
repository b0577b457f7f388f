"""GPT-NeoX: q, k, v of each head side by side, rotary positions on part of each head, parallel residual."""

from lightning_hybrid.containers.family import Family

GPT_NEOX = Family(
    trunk="gpt_neox",
    embedding="embed_in",
    final_norm="final_layer_norm",
    attention="attention",
    qkv=("query_key_value",),
    interleaved=True,
    attention_out="dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    activation="mlp.act",
    gated=False,
    parallel="use_parallel_residual",
)
