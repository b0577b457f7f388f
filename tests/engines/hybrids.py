"""Hybrid engines over tiny models, and a step of training for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_hybrid.engines import backward, build_engine, engine_config, gathered
from lightning_hybrid.models import Policy
from tests.helpers import SHARD_EVERYTHING


def hybrid(policy: Policy, stage: int = 2, precision: str = "32-true", **keys: Any) -> Any:
    """A hybrid engine; ``keys`` are those of DeepSpeed's ``hybrid_engine`` section."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    overrides = SHARD_EVERYTHING if stage == 3 else None
    config = engine_config(stage=stage, precision=precision, hybrid_engine=keys, overrides=overrides)
    return build_engine(policy, optimizer, config, hybrid=True)


def step(engine: Any, policy: Policy, seed: int = 0) -> None:
    engine.train()
    tokens = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens).bool()
    asked = mask.clone()
    asked[:, 0] = False
    backward(-policy(tokens, mask, asked).logprobs.mean(), [engine])
    engine.step()


def failing_at_the_third_call(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def call(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyError("in the middle")
        return function(*arguments)

    return call


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    with gathered(module):
        return {name: value.detach().clone() for name, value in module.state_dict().items()}
