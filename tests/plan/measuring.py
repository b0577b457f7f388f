"""A rank that runs PPO with real models and says what each phase added to its process's memory, at most."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_hybrid import HybridDeepSpeedStrategy, PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.models import build_policy
from tests.helpers import TINY_LLAMA, quiet_trainer

PHASE_OF = {"rollout": "generate", "reward": "score", "experience": "score", "update": "train"}
# So that memory given back goes back to the system, and what is counted is what is held.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


class Meter:
    """The process's largest resident memory in each phase of the last iteration."""

    def __init__(self) -> None:
        self.phase: str | None = None
        self.bytes: dict[str, int] = {}

    def enter(self, name: str | None) -> None:
        """End the phase before, and begin another."""
        if self.phase is not None:
            self.bytes[self.phase] = max(self.bytes.get(self.phase, 0), highest())
        self.phase = None if name is None else PHASE_OF[name]
        settle()


def settle() -> None:
    """Give free memory back, and start counting anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def highest() -> int:
    """Largest resident memory since counting started, bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class EachIteration(L.Callback):
    """Measure the iteration that runs, and forget those before it: optimizers make their states in the first."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_start(self, *_: Any) -> None:
        self.meter.bytes.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self.meter.enter(None)


def prompts(batch_size: int, longest: int, iterations: int) -> DataLoader[Any]:
    """Prompts of half to all of the longest length, so that rows are padded."""
    lengths = [longest - i % (longest // 2) for i in range(batch_size * iterations * 2)]
    rows = [[1 + j % 40 for j in range(length)] for length in lengths]

    def collate(batch: list[list[int]]) -> dict[str, Any]:
        return {"prompts": ["mia visits"] * len(batch), "prompt_ids": batch}

    return DataLoader(rows, batch_size=batch_size, collate_fn=collate)


def fit(cell: dict[str, Any], architecture: dict[str, Any], meter: Meter, iterations: int) -> None:
    torch.manual_seed(0)
    vocabulary = architecture["vocab_size"]
    ppo = PPOModule(
        build_policy(architecture, vocabulary, cell["algorithm"].get("logprob_chunk", 1024)),
        lambda prompts, responses: [float(len(response)) for response in responses],
        PPOConfig(**cell["algorithm"]),
        RolloutConfig(**cell["rollout"]),
        build_tokenizer(),
    )
    ppo.phases.listeners.append(meter.enter)
    strategy = HybridDeepSpeedStrategy(stage=cell["stage"], hybrid_engine=cell.get("hybrid_engine"))
    ranks = cell["ranks"]
    trainer = quiet_trainer(
        strategy, max_steps=iterations, devices=ranks, precision=cell["precision"], callbacks=[EachIteration(meter)]
    )
    trainer.fit(ppo, prompts(cell["batch_size"], cell["prompt"], iterations))


def measure(cell: dict[str, Any]) -> None:
    """Entry point of a rank: print the growth of each phase over a process that has run PPO on a tiny model before."""
    fit(cell, TINY_LLAMA | {"vocab_size": 64, "max_position_embeddings": 1024}, Meter(), 1)
    settle()
    before, meter = highest(), Meter()
    fit(cell, cell["architecture"], meter, 2)
    print("measured:", json.dumps({phase: size - before for phase, size in meter.bytes.items()}))
