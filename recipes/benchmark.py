"""What the strategy costs: the same two engines driven by hand and through ``Trainer.fit``, in turn, in one process.

Both train a policy and a critic (Llama-shaped, fresh weights) on the same batches: one forward, backward and step of
each per iteration. By hand means what DeepSpeed's documentation shows: ``engine(...)``, ``engine.backward(loss)``,
``engine.step()``. The table gives the median seconds of an iteration for each round and the median of the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_hybrid.engines import engine_config, prepare_deepspeed
from lightning_hybrid.models import build_policy
from lightning_hybrid.modules.optimization import make_adamw
from lightning_hybrid.modules.roles import scalar_from_policy
from lightning_hybrid.strategy import HybridDeepSpeedStrategy

VOCABULARY = 2048
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


class TwoEngines(L.LightningModule):
    """A policy and a critic with an optimizer each; one iteration is one step of both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.policy = build_policy(ARCHITECTURE, VOCABULARY)
        self.critic = scalar_from_policy(self.policy)
        self.times: list[float] = []

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Two losses on ``[batch, time]`` tokens, each through one network."""
        return policy_loss(self.policy, tokens), critic_loss(self.critic, tokens)

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it; a single process stands for one launched
    L.seed_everything(0, verbose=False)
    batches = torch.randint(0, VOCABULARY, (options.iterations, options.batch, options.length))
    prepare_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'stage':>5} {'by hand, ms':>12} {'trainer, ms':>12} {'ratio':>7}")
    for stage in options.stages:
        # The Trainer first: it starts the process group that the loop by hand then uses.
        rounds = [(through_the_trainer(stage, batches), by_hand(stage, batches)) for _ in range(options.rounds)]
        trainer, hand = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(ours / theirs for ours, theirs in rounds)
        print(f"{stage:>5} {hand * 1e3:>12.2f} {trainer * 1e3:>12.2f} {ratio:>7.3f}")


if __name__ == "__main__":
    main()
