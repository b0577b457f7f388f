"""Plans that several tests make."""

from __future__ import annotations

from typing import Any

from lightning_hybrid.config import PlanRun, validate
from lightning_hybrid.engines.config import merged
from lightning_hybrid.plan import Plan, make_plan

# Large enough that the memory of models drowns that of the process, small enough for a test.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
CPU_RUN: dict[str, Any] = {
    "model": {"architecture": LLAMA},
    "data": {"path": "unread", "batch_size": 8},
    "algorithm": {"micro_batch_size": 4, "logprob_chunk": 128},
    "rollout": {"max_new_tokens": 64},
    "strategy": {"name": "hybrid_deepspeed_stage_2"},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 1},
    "prompt_tokens": 128,
    "output_dir": "outputs",
}
GPU_RUN = merged(CPU_RUN, {"trainer": {"accelerator": "gpu", "precision": "bf16-mixed"}, "device_memory_gib": 80.0})


def plan_of(run: dict[str, Any], **changes: Any) -> Plan:
    """The plan of a run with some groups changed."""
    return make_plan(validate(PlanRun, merged(run, changes)))
