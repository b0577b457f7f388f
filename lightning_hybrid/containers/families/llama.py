"""Llama: the family whose names the others share."""

from lightning_hybrid.containers.family import Family

LLAMA = Family()
