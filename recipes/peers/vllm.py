"""vLLM in this process: its own copy of the weights, brought up to date at every switch."""

from __future__ import annotations

import os
import tempfile
from importlib import import_module
from typing import Any

import torch

from lightning_hybrid.rollout.vllm.engine import take_weights
from peers.base import Peer, why_not_importable
from peers.measure import PeakMemory
from peers.subject import Subject
from peers.workload import Workload

_CACHE_BYTES_ON_CPU = 1 << 30


class VLLM(Peer):
    """Continuous batching over a paged cache; eager on a CPU, CUDA graphs on CUDA."""

    name = "vLLM"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, like the others
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        held = PeakMemory()
        with held(), tempfile.TemporaryDirectory() as folder:
            subject.causal_lm.save_pretrained(folder)
            self.llm: Any = import_module("vllm").LLM(model=folder, **_options(subject.device))
        self.held_bytes = held.bytes or 0
        self.extra_weight_bytes = sum(p.numel() * p.element_size() for p in subject.causal_lm.parameters())

    @staticmethod
    def absent() -> str | None:
        """Why it cannot be measured here, or None where it can."""
        return why_not_importable("vllm")

    def enter(self) -> None:
        """Copy the trained weights into vLLM's, all at once, and forget what was cached with the old ones."""
        self.llm.collective_rpc(take_weights, kwargs={"weights": self.subject.causal_lm.named_parameters()})
        self.llm.reset_prefix_cache()

    def generate(self, workload: Workload, seed: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        sampling = import_module("vllm").SamplingParams(
            max_tokens=workload.max_new_tokens,
            temperature=1.0,
            stop_token_ids=list(workload.eos_ids),
            detokenize=False,
            seed=None,
        )
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in workload.prompts]
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _options(device: torch.device) -> dict[str, Any]:
    common = {"skip_tokenizer_init": True}
    if device.type == "cuda":
        return common | {"dtype": "bfloat16", "gpu_memory_utilization": 0.4}
    return common | {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": _CACHE_BYTES_ON_CPU,
    }
