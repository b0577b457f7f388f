"""Adapters under reinforcement learning: the base stays, is the reference, and is not held twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hybrid import HybridDeepSpeedStrategy, PPOModule, RolloutConfig
from lightning_hybrid.algorithms import GRPOConfig, OnlineConfig, PPOConfig
from lightning_hybrid.config import AdapterConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.engines import gathered
from lightning_hybrid.models import with_adapter
from tests.helpers import SHARD_EVERYTHING, tiny_policy
from tests.modules.test_online_algorithms import fit
from tests.modules.test_ppo import warm_share

ADAPTER = AdapterConfig(r=8, alpha=16)


def adapted(config: OnlineConfig, **arguments: Any) -> PPOModule:
    policy = tiny_policy()
    policy.model.lm_head.weight.data *= 6  # fresh and frozen, it could hardly tell one token from another
    policy = with_adapter(policy, ADAPTER)
    return PPOModule(policy, warm_share, config, RolloutConfig(max_new_tokens=8), build_tokenizer(), **arguments)


def frozen_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    with gathered(module):
        return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


def strategy(stage: int) -> HybridDeepSpeedStrategy:
    return HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING if stage == 3 else None)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_base_under_the_adapters_is_the_reference_and_stays_as_it_was(stage: int) -> None:
    module = adapted(GRPOConfig(actor_lr=1e-2, micro_batch_size=64, group_size=4, kl_coef=0.001))
    before = frozen_weights(module.actor)
    rows = fit(module, steps=4, strategy=strategy(stage))
    assert module.frozen == []
    assert rows[0]["policy/kl"] == 0.0
    assert rows[-1]["policy/kl"] > 0.0
    after = frozen_weights(module.actor)
    assert before
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_adapters_learn_what_the_reward_prefers() -> None:
    rows = fit(adapted(GRPOConfig(actor_lr=1e-2, micro_batch_size=64, group_size=4, kl_coef=0.001)), steps=40)
    first, last = (sum(row["reward/score"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert first < 0.1
    assert last > 0.2


def test_a_critic_may_have_adapters_too_and_then_trains_them_and_its_head_only() -> None:
    config = PPOConfig(actor_lr=1e-2, critic_lr=1e-2, micro_batch_size=16)
    module = adapted(config, critic_adapter=ADAPTER)
    assert module.critic is not None
    before, head = frozen_weights(module.critic), [p for n, p in module.critic.named_parameters() if "score" in n]
    trained = [p.detach().clone() for p in head if p.requires_grad]
    fit(module, steps=2)
    after = frozen_weights(module.critic)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not all(torch.equal(a, b) for a, b in zip(trained, [p for p in head if p.requires_grad], strict=True))
