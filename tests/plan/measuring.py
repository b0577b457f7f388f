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

from lightning_hybrid import HybridDeepSpeedStrategy, PPOModule, RolloutConfig
from lightning_hybrid.algorithms import ALGORITHMS
from lightning_hybrid.callbacks import EMA
from lightning_hybrid.config import RewardSourceConfig, RolesConfig
from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.models import build_policy, with_adapter
from lightning_hybrid.rewards import reward_from
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
    module = module_of(cell, architecture)
    module.phases.listeners.append(meter.enter)
    strategy = HybridDeepSpeedStrategy(stage=cell["stage"], hybrid_engine=cell.get("hybrid_engine"))
    decay = cell.get("callbacks", {}).get("ema_decay")
    callbacks = [EachIteration(meter), *([] if decay is None else [EMA("actor", decay)])]
    trainer = quiet_trainer(
        strategy, max_steps=iterations, devices=cell["ranks"], precision=cell["precision"], callbacks=callbacks
    )
    trainer.fit(module, prompts(cell["batch_size"], cell["prompt"], iterations))


def module_of(cell: dict[str, Any], architecture: dict[str, Any]) -> PPOModule:
    """What the recipe would make of the same settings."""
    algorithm, adapters = dict(cell["algorithm"]), cell.get("adapters", {})
    config = ALGORITHMS[algorithm.get("name", "ppo")](**algorithm)
    policy = build_policy(architecture, architecture["vocab_size"], config.logprob_chunk)
    given = {name: AdapterConfig(**settings) for name, settings in adapters.items()}
    return PPOModule(
        with_adapter(policy, given.get("adapter")),
        reward_of(cell),
        config,
        RolloutConfig(**cell["rollout"]),
        build_tokenizer(),
        ptx=InstructionDataModule(**cell["ptx"], prompt_key=None, response_key="text") if "ptx" in cell else None,
        roles=RolesConfig(**cell.get("roles", {})),
        critic_adapter=given.get("critic_adapter"),
    )


def reward_of(cell: dict[str, Any]) -> Any:
    """The configured reward, or a function that takes no memory."""
    if "reward" in cell:
        return reward_from(RewardSourceConfig(**cell["reward"]))
    return lambda prompts, responses: [float(len(response)) for response in responses]


def measure(cell: dict[str, Any]) -> None:
    """Entry point of a rank: print the growth of each phase over a process that has run PPO on a tiny model before."""
    fit(cell, TINY_LLAMA | {"vocab_size": 64, "max_position_embeddings": 1024}, Meter(), 1)
    settle()
    before, meter = highest(), Meter()
    fit(cell, cell["architecture"], meter, 2)
    print("measured:", json.dumps({phase: size - before for phase, size in meter.bytes.items()}))
