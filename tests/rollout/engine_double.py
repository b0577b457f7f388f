"""The process of an engine without vLLM: it takes weights like one, and draws the token that a weight names."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch

from lightning_hybrid.rollout.vllm.engine_server import Routes, main
from lightning_hybrid.rollout.vllm.loop import EngineLoop
from lightning_hybrid.rollout.vllm.machine import Drawn
from lightning_hybrid.rollout.vllm.requests import Draw
from lightning_hybrid.rollout.vllm.transfer import Announced, Meeting, receive
from lightning_hybrid.rollout.vllm.workers import join_group, leave_group
from lightning_hybrid.serving import Route

NAMING = "model.norm.weight"  # whose first number, rounded, is the token that is drawn
LAST_ONE = "LAST_ENGINE_DIES_WHEN_IT_JOINS"
STEP_SECONDS = 0.05
DEADLY, STALLING = 13, 14  # tokens of a prompt that the engine does not survive, or never finishes a step with


class DoubledMachine:
    """One worker, which belongs to the group of weights like vLLM's do."""

    def __init__(self) -> None:
        self._worker = SimpleNamespace(rank=0, device=torch.device("cpu"))
        self._running: dict[str, tuple[list[int], int]] = {}
        self._token = -1

    def add(self, name: str, prompt: Sequence[int], draw: Draw, drawn: int) -> None:
        self._running[name] = (list(prompt), draw.sampling.max_new_tokens - drawn)

    def step(self) -> list[Drawn]:
        time.sleep(STEP_SECONDS)
        for prompt, _ in self._running.values():
            assert DEADLY not in prompt, "a deadly prompt"
            while STALLING in prompt:
                time.sleep(1)
        self._running = {name: (prompt, left - 1) for name, (prompt, left) in self._running.items()}
        ended = {name: "length" if left == 0 else None for name, (_, left) in self._running.items()}
        self._running = {name: running for name, running in self._running.items() if ended[name] is None}
        return [Drawn(name, [self._token], [-0.5], reason) for name, reason in ended.items()]

    def stop(self, names: Sequence[str]) -> None:
        self._running.clear()

    def join(self, meeting: Meeting, first: int, host: str) -> None:
        if first == meeting.size - 1 and LAST_ONE in os.environ:
            os._exit(3)
        join_group(self._worker, asdict(meeting), first, host)

    def take(self, announced: Announced, bucket_bytes: int) -> None:
        try:
            weights = dict(receive(announced, bucket_bytes, self._worker.weight_group))
        except BaseException:
            leave_group(self._worker)
            raise
        self._token = round(float(weights[NAMING][0]))


def make(settings: dict[str, Any]) -> Mapping[str, Route]:
    return Routes(EngineLoop(DoubledMachine()), 64).by_name()


if __name__ == "__main__":
    main(make)
