"""Rollouts by vLLM: inside the ranks that train, asleep while they do; or in processes of its own, beside them."""

from __future__ import annotations

from lightning_hybrid.rollout.vllm.backend import VLLMRollout
from lightning_hybrid.rollout.vllm.separate import SeparateVLLM

__all__ = ["SeparateVLLM", "VLLMRollout"]
