"""What the strategy's engines are measured beside: the same two engines driven by hand.

By hand means what DeepSpeed's documentation shows: ``engine(...)``, ``engine.backward(loss)``, ``engine.step()``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_hybrid.engines import engine_config
from lightning_hybrid.models import build_policy, scalar_from_policy
from lightning_hybrid.modules.optimization import make_adamw
from lightning_hybrid.strategy import HybridDeepSpeedStrategy
from peers.subject import SHAPES


class TwoEngines(L.LightningModule):
    """A policy and a critic with an optimizer each; one iteration is one step of both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.policy = build_policy(SHAPES["tiny"], SHAPES["tiny"]["vocab_size"])
        self.critic = scalar_from_policy(self.policy)
        self.times: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Step both."""
        self.times.append(time.perf_counter())
        for network, loss, optimizer in zip(
            (self.policy, self.critic), (policy_loss, critic_loss), self.optimizers(), strict=True
        ):
            self.manual_backward(loss(network, batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One AdamW each."""
        return [make_adamw(n.parameters(), 1e-4, 0.0, (0.9, 0.95)) for n in (self.policy, self.critic)]


def policy_loss(policy: Any, tokens: Tensor) -> Tensor:
    """Negative log-prob of all but the first token."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    asked = mask.clone()
    asked[:, 0] = False
    loss: Tensor = -policy(tokens, mask, asked).logprobs.mean()
    return loss


def critic_loss(critic: Any, tokens: Tensor) -> Tensor:
    """Squared distance of all values from 1."""
    loss: Tensor = (critic(tokens, torch.ones_like(tokens, dtype=torch.bool)) - 1).square().mean()
    return loss


def through_the_trainer(stage: int, batches: Tensor) -> float:
    """Median seconds of an iteration inside ``Trainer.fit``."""
    module = TwoEngines()
    trainer = L.Trainer(
        strategy=HybridDeepSpeedStrategy(stage=stage),
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return _median_gap(module.times)


def by_hand(stage: int, batches: Tensor) -> float:
    """Median seconds of an iteration of a plain loop over two DeepSpeed engines."""
    import deepspeed

    module, engines = TwoEngines(), []
    config = engine_config(stage=stage, precision="32-true")
    for network, optimizer in zip((module.policy, module.critic), module.configure_optimizers(), strict=True):
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=dict(config))
        engines.append(engine)
    times = []
    for batch in batches.to(engines[0].device):
        times.append(time.perf_counter())
        for engine, loss in zip(engines, (policy_loss, critic_loss), strict=True):
            engine.backward(loss(engine, batch))
            engine.step()
    for engine in engines:
        engine.destroy()
    return _median_gap(times)


def _median_gap(times: list[float], warmup: int = 3) -> float:
    gaps = [after - before for before, after in zip(times[warmup:], times[warmup + 1 :], strict=False)]
    return statistics.median(gaps)
