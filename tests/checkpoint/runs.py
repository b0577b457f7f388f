"""PPO runs of a tiny model, whole or resumed, and everything that must be the same in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_hybrid import HybridDeepSpeedStrategy, PPOConfig, PPOModule, PromptDataModule, RolloutConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.modules.roles import scalar_from_policy
from tests.helpers import SHARD_EVERYTHING, quiet_trainer, tiny_policy, weights_of

CLOCKS = ("seconds/", "throughput/", "engine/", "memory/")


def share_of_warm(prompts: list[str], responses: list[str]) -> list[float]:
    return [response.split().count("warm") / max(len(response.split()), 1) for response in responses]


def with_adapters() -> Any:
    from peft import LoraConfig, get_peft_model

    policy = tiny_policy()
    policy.model = get_peft_model(policy.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return policy


def ppo(lora: bool = False, **config: Any) -> PPOModule:
    settings = {
        "actor_lr": 3e-3,
        "critic_lr": 3e-3,
        "kl_coef": 0.05,
        "kl_target": 2.0,
        "normalize_reward": True,
        "micro_batch_size": 4,
        "minibatch_size": 8,
        "schedule": "cosine",
        "warmup_steps": 2,
    } | config
    policy = with_adapters() if lora else tiny_policy()
    return PPOModule(
        policy,
        share_of_warm,
        PPOConfig(**settings),
        RolloutConfig(max_new_tokens=8),
        build_tokenizer(),
        critic=scalar_from_policy(tiny_policy()),
    )


def prompt_file(folder: Path, rows: int = 40) -> Path:
    subjects, places = ("mia", "tom", "ada", "ben"), ("market", "farm", "museum", "garden", "house")
    texts = [f"{s} sees the {p} ." for s in subjects for p in places]
    path = folder / "prompts.txt"
    path.write_text("\n".join((texts * rows)[:rows]) + "\n", encoding="utf-8")
    return path


class Diary(L.Callback):
    """What each step logged and sampled."""

    def __init__(self) -> None:
        self.steps: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(CLOCKS)}
        self.steps[trainer.global_step] = {"metrics": logged, "tokens": pl_module.last_rollout.tokens.tolist()}


class SaveAt(L.Callback):
    """Save after a step, as ModelCheckpoint does."""

    def __init__(self, steps: tuple[int, ...], folder: Path) -> None:
        self.steps = steps
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def strategy(stage: int, **arguments: Any) -> HybridDeepSpeedStrategy:
    return HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING if stage == 3 else None, **arguments)


def train(
    module: PPOModule,
    data: Path,
    steps: int,
    plugin: HybridDeepSpeedStrategy,
    callbacks: tuple[L.Callback, ...] = (),
    resume: Path | None = None,
    batch_size: int = 8,
    **arguments: Any,
) -> tuple[dict[int, Any], torch.Tensor]:
    """Train to a number of steps; the diary, and the weights of actor and critic."""
    L.seed_everything(0, verbose=False)
    diary = Diary()
    weights: list[torch.Tensor] = []

    class Keep(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            weights.extend([weights_of(pl_module.actor), weights_of(pl_module.critic)])

    trainer = quiet_trainer(plugin, max_steps=steps, callbacks=[diary, *callbacks, Keep()], **arguments)
    prompts = PromptDataModule(str(data), tokenizer=build_tokenizer(), prompt_key="text", batch_size=batch_size, seed=3)
    trainer.fit(module, datamodule=prompts, ckpt_path=None if resume is None else str(resume))
    return diary.steps, torch.cat(weights)
