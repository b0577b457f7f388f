"""Ours: a PPO step through Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_hybrid.config import PPOConfig, RolloutConfig
from lightning_hybrid.modules import PPOModule
from lightning_hybrid.strategy import HybridDeepSpeedStrategy
from peers.measure import now
from peers.steps import Step, StepRun
from peers.subject import Source
from peers.workload import Workload


class PPOSteps(StepRun):
    """A PPO step: rollout, reward, old and reference log-probs, values, one epoch of actor and critic updates."""

    name = "PPO step"

    @staticmethod
    def absent() -> str | None:
        """Never: it is what is measured."""
        return None

    def run(self, source: Source, workload: Workload, per_prompt: int, steps: int, seed: int) -> list[Step]:
        """Train a fresh copy of the weights for some steps."""
        rows = len(workload.prompts)
        policy = source.policy()
        workload.tell(policy.model)
        module = PPOModule(
            policy,
            reward=lambda prompts, responses: self.reward(responses),
            config=PPOConfig(epochs=1, micro_batch_size=min(rows, 16)),
            rollout=RolloutConfig(max_new_tokens=workload.max_new_tokens),
            tokenizer=source.tokenizer(),
            seed=seed,
        )
        each = [i for i in range(rows // per_prompt) for _ in range(per_prompt)]
        batch = {
            "prompts": [workload.texts[i] for i in each],
            "prompt_ids": [list(workload.prompts[i]) for i in each],
        }
        timer = _Timer()
        on_cuda = torch.cuda.is_available()
        trainer = L.Trainer(
            strategy=HybridDeepSpeedStrategy(stage=2),
            accelerator="cuda" if on_cuda else "cpu",
            precision="bf16-mixed" if on_cuda else "32-true",
            devices=1,
            max_steps=steps + 1,  # a step ends where the next begins
            callbacks=[timer],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader([batch] * (steps + 1), batch_size=None))  # type: ignore[arg-type]
        return self.between(timer.begun, timer.rollouts, timer.tokens)


class _Timer(L.Callback):
    """When each step began, how long its rollout took, and how many tokens it sampled."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.rollouts: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun.append(now())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        assert isinstance(module, PPOModule)
        self.rollouts.append(module.phases.seconds["rollout"])
        rollout: Any = module.last_rollout
        self.tokens.append(int(rollout.lengths.sum()))
