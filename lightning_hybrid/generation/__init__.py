"""The decode loop over inference containers: sampling, stopping, batching. What comes out is a :class:`Rollout`."""

from lightning_hybrid.generation.api import (
    check_prompts,
    end_ids,
    generate,
    sample_with,
    warn_without_container,
)
from lightning_hybrid.generation.carrier import Rollout, in_place, join, lay_out, pad_left, used_columns
from lightning_hybrid.generation.draw import Sampler
from lightning_hybrid.generation.memory import capacity_of, slots_for
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.generation.stopping import StopTexts
from lightning_hybrid.generation.workspace import Workspace

__all__ = [
    "Rollout",
    "Sampler",
    "SamplingParams",
    "StopTexts",
    "Workspace",
    "capacity_of",
    "check_prompts",
    "end_ids",
    "generate",
    "in_place",
    "join",
    "lay_out",
    "pad_left",
    "sample_with",
    "slots_for",
    "used_columns",
    "warn_without_container",
]
