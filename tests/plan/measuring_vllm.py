"""A rank that starts a vLLM engine and says what it added to its process's memory."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import torch

from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.models import build_policy
from lightning_hybrid.rollout.vllm.startup import end_engine, start_engine
from lightning_hybrid.rollout.vllm.weights import WeightStream
from tests.plan.plans import LLAMA

# The least that vLLM's attention on a CPU runs; its engine builds and imports what is there only once.
SMALL = LLAMA | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}


def resident() -> int:
    """Memory of this process, less what it only has not given back yet, bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def growth(architecture: dict[str, Any], cache_gib: float) -> int:
    """What an engine adds, once it has been given its weights."""
    model = build_policy(architecture, architecture["vocab_size"]).model
    config, before = VLLMConfig(kv_cache_gib=cache_gib), resident()
    engine = start_engine(WeightStream(model), config, torch.device("cpu"), torch.float32)
    with engine.awake(None, WeightStream(model)):
        after = resident()
    end_engine(engine)
    return after - before


def measure_engine(architecture: dict[str, Any], cache_gib: float) -> None:
    """Entry point of a rank: print the growth by an engine, in a process that has had a small one before."""
    torch.distributed.init_process_group("gloo")
    growth(SMALL, 0.05)
    print("measured:", json.dumps(growth(architecture, cache_gib)))
