"""The families that have a container. A new one is a file here and a line in :data:`FAMILIES`."""

from lightning_hybrid.containers.families.bloom import BLOOM
from lightning_hybrid.containers.families.gemma2 import GEMMA2
from lightning_hybrid.containers.families.gemma3 import GEMMA3
from lightning_hybrid.containers.families.gpt2 import GPT2
from lightning_hybrid.containers.families.gpt_neox import GPT_NEOX
from lightning_hybrid.containers.families.llama import LLAMA
from lightning_hybrid.containers.families.mistral import MISTRAL
from lightning_hybrid.containers.families.opt import OPT
from lightning_hybrid.containers.families.phi3 import PHI3
from lightning_hybrid.containers.families.qwen2 import QWEN2
from lightning_hybrid.containers.families.qwen3 import QWEN3
from lightning_hybrid.containers.family import Family

# `config.model_type` → family.
FAMILIES: dict[str, Family] = {
    "bloom": BLOOM,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}

__all__ = ["FAMILIES", "Family"]
