"""Qwen3: each head's query and key are normalised."""

from lightning_hybrid.containers.family import Family

QWEN3 = Family(window="by_type", q_norm="q_norm", k_norm="k_norm")
