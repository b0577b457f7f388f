"""Models in folders, and a PPO module whose frozen ones are in the ranks or in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_hybrid import PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.config import EvaluationConfig, RolesConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.models import scalar_from_policy
from tests.helpers import tiny_policy

IN_RANKS = RolesConfig()
SEPARATE = RolesConfig(reference={"separate": True}, reward={"separate": True})  # type: ignore[arg-type]
TEXTS = ["mia visits the market .", "tom leaves the farm .", "ada sees the museum .", "leo"]


def save_models(folder: Path) -> None:
    """An actor, a reference that differs from it, and a reward model, each with its tokenizer."""
    reward = scalar_from_policy(tiny_policy(3))
    torch.manual_seed(5)
    torch.nn.init.normal_(reward.model.score.weight)
    models = {"actor": tiny_policy(0).model, "reference": tiny_policy(1).model, "reward": reward.model}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)


def ppo(folder: Path, roles: RolesConfig, **config: Any) -> PPOModule:
    settings = {"actor_lr": 3e-3, "critic_lr": 3e-3, "kl_coef": 0.1, "micro_batch_size": 4} | config
    return PPOModule(
        str(folder / "actor"),
        str(folder / "reward"),
        PPOConfig(**settings),
        RolloutConfig(max_new_tokens=6, stop=["the market"]),
        reference=str(folder / "reference"),
        roles=roles,
        evaluation=EvaluationConfig(samples=2),
    )


def prompts(rows: int = 8, batch_size: int = 4) -> DataLoader[Any]:
    tokenizer = build_tokenizer()
    texts = [TEXTS[i % 4] for i in range(rows)]

    def collate(batch: list[str]) -> dict[str, Any]:
        return {"prompts": batch, "prompt_ids": [[1, *tokenizer(text)["input_ids"]] for text in batch]}

    return DataLoader(texts, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]
