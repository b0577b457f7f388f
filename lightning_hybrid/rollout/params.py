"""From the configuration of a rollout to how tokens are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.generation import SamplingParams


def sampling_params(config: RolloutConfig, eos_ids: Sequence[int], greedy: bool, n: int = 1) -> SamplingParams:
    """The decode loop's terms for a configuration."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=0.0 if greedy else config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        n=n,
        stop=tuple(config.stop),
        repetition_penalty=config.repetition_penalty,
        min_new_tokens=config.min_new_tokens,
        eos_ids=tuple(eos_ids),
    )
