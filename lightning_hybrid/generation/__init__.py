"""The decode loop over inference containers: sampling, stopping, batching. What comes out is a :class:`Rollout`."""

from lightning_hybrid.generation.api import (
    check_prompts,
    end_ids,
    generate,
    make_workspace,
    sample_with,
    warn_without_container,
)
from lightning_hybrid.generation.carrier import Rollout, pad_left
from lightning_hybrid.generation.draw import Sampler
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.generation.stopping import StopTexts
from lightning_hybrid.generation.workspace import Workspace

__all__ = [
    "Rollout",
    "Sampler",
    "SamplingParams",
    "StopTexts",
    "Workspace",
    "check_prompts",
    "end_ids",
    "generate",
    "make_workspace",
    "pad_left",
    "sample_with",
    "warn_without_container",
]
