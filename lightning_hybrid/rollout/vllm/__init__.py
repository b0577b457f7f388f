"""Rollouts by vLLM, inside the ranks that train: a second copy of the weights, there only while it generates."""

from __future__ import annotations

from lightning_hybrid.rollout.vllm.backend import VLLMRollout

__all__ = ["VLLMRollout"]
