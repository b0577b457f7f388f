"""Mistral: Llama with a sliding window in every layer."""

from lightning_hybrid.containers.family import Family

MISTRAL = Family(window="all")
