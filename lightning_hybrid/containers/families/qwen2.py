"""Qwen2: Llama with biases on q, k and v, and sliding windows in some layers."""

from lightning_hybrid.containers.family import Family

QWEN2 = Family(window="by_type")
