"""Gemma 3 (text): Gemma 2 with normalised queries and keys, and other rotary frequencies where a window slides."""

from lightning_hybrid.containers.families.gemma2 import GEMMA_NORMS, bidirectional
from lightning_hybrid.containers.family import Family

GEMMA3 = Family(
    norms=GEMMA_NORMS,
    unit_offset=True,
    q_norm="q_norm",
    k_norm="k_norm",
    window="by_type",
    unsupported=bidirectional,
)
