"""Phi-3: q, k, v in one projection, gate and up in another."""

from lightning_hybrid.containers.family import Family

PHI3 = Family(qkv=("qkv_proj",), mlp_in=("mlp.gate_up_proj",), activation="mlp.activation_fn", window="all")
