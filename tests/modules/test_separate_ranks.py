"""Frozen models in processes of their own, asked by two ranks: the same figures; what dies stops both, and is told."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_hybrid.config import RolesConfig
from tests.helpers import quiet_trainer
from tests.modules.separate import IN_RANKS, SEPARATE, ppo, prompts, save_models

pytestmark = pytest.mark.slow


class Iterations(L.Callback):
    """Scores, KL and losses of each iteration; and whom to kill before which."""

    def __init__(self, killed_before: tuple[int, ...] = ()) -> None:
        self.rows: list[dict[str, float]] = []
        self.killed_before = killed_before

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.killed_before:
            for server in pl_module.separate._running[1:]:  # the reference, on the first rank
                os.kill(server._process.pid, signal.SIGKILL)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        names = ("reward/score", "policy/kl", "policy/loss", "value/loss", "rollout/response_length")
        self.rows.append({name: float(trainer.callback_metrics[name]) for name in names})


def fit(folder: str, roles: RolesConfig, killed_before: tuple[int, ...] = ()) -> list[dict[str, float]]:
    iterations = Iterations(killed_before)
    trainer = quiet_trainer("hybrid_deepspeed", devices=2, max_steps=3, max_epochs=-1, callbacks=[iterations])
    trainer.fit(ppo(Path(folder), roles), prompts())
    return iterations.rows


def both_ways(folder: str) -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    print(json.dumps([fit(folder, roles) for roles in (SEPARATE, IN_RANKS)]))


def test_two_ranks_log_the_same_wherever_the_frozen_models_are(tmp_path: Path, run_ranks: Any) -> None:
    save_models(tmp_path)
    for output in run_ranks(both_ways, 2, str(tmp_path), timeout=300):
        separate, in_ranks = json.loads(output.splitlines()[-1])
        assert len(separate) == 3
        for row, other in zip(separate, in_ranks, strict=True):
            assert row == pytest.approx(other, abs=1e-5, rel=1e-5)
            assert row["policy/kl"] != 0.0


def the_reference_dies_twice(folder: str) -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    try:
        fit(folder, SEPARATE, killed_before=(1, 2))
    except Exception as error:
        print(f"stopped by {type(error).__name__}:", str(error).replace("\n", " "), "together:", error.on_every_rank)  # type: ignore[attr-defined]


def test_a_reference_that_dies_again_stops_both_ranks_and_is_named(tmp_path: Path, run_ranks: Any) -> None:
    save_models(tmp_path)
    for output in run_ranks(the_reference_dies_twice, 2, str(tmp_path), timeout=300):
        told = output.splitlines()[-1]
        assert told.startswith("stopped by ServerError: the reference failed on 2 of 2 ranks:")
        assert "rank 0: ServerError: the reference: its process was killed by SIGKILL" in told
        assert "rank 1: ServerError: the reference at http://127.0.0.1:" in told
        assert "together: True" in told
