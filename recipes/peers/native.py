"""Ours: the engine that trains the weights samples with them."""

from __future__ import annotations

from lightning_hybrid.generation import SamplingParams
from peers.base import Peer
from peers.workload import Workload


class Native(Peer):
    """``engine.eval()``, ``engine.sample(...)``, ``engine.train()``; the sampled tokens' log-probs come with them."""

    name = "native"
    must_run = True
    prepares = True

    def enter(self) -> None:
        """Switch from training to inference."""
        self.subject.engine.eval()

    def leave(self) -> None:
        """Switch from inference to training."""
        self.extra_weight_bytes = int(self.subject.engine.extra_weight_bytes)
        self.subject.engine.train()

    def generate(self, workload: Workload, seed: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        sampling = SamplingParams(max_new_tokens=workload.max_new_tokens, eos_ids=workload.eos_ids)
        rows: list[list[int]] = self.subject.engine.sample(workload.prompts, sampling, seed=seed).responses
        return rows
