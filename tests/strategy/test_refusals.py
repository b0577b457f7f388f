"""What the strategy cannot do right it refuses before training, with the remedy."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hybrid import EngineSpec, HybridDeepSpeedStrategy
from lightning_hybrid.errors import StrategyError
from lightning_hybrid.strategy.ownership import assign_owners
from tests.helpers import GAN, Regression, quiet_trainer, random_batches


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


@pytest.fixture
def root() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})


def test_two_optimizers_that_share_parameters_are_named(root: Any) -> None:
    with pytest.raises(StrategyError, match=r"optimizers 0 and 1 share 'b\.bias', 'b\.weight'"):
        assign_owners(root, [sgd(root.a, root.b), sgd(root.b, root.c)], {})


def test_a_trainable_parameter_without_optimizer_is_named_with_three_remedies(root: Any) -> None:
    with pytest.raises(
        StrategyError, match=r"'c\.bias', 'c\.weight' require gradients but belong to no optimizer: give"
    ):
        assign_owners(root, [sgd(root.a), sgd(root.b)], {})


def test_a_frozen_child_needs_no_optimizer(root: Any) -> None:
    owners = assign_owners(root, [sgd(root.a), sgd(root.b)], {"c": EngineSpec("frozen")})
    assert [owner.name for owner in owners] == ["a", "b"]


def test_all_problems_are_reported_at_once(root: Any) -> None:
    with pytest.raises(StrategyError, match=r"(?s)names 'd', which is no submodule.*share 'a\.bias'.*'c\.bias'"):
        assign_owners(root, [sgd(root.a), sgd(root.a, root.b)], {"d": EngineSpec("frozen")})


def test_optimizers_inside_one_child_get_engines_deeper_down() -> None:
    root = nn.ModuleDict({"networks": nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 2)})})
    owners = assign_owners(root, [sgd(root.networks.g), sgd(root.networks.d)], {})
    assert [owner.name for owner in owners] == ["networks.g", "networks.d"]


def test_parameters_mixed_over_children_cannot_be_separated(root: Any) -> None:
    first = torch.optim.SGD([root.a.weight, root.b.weight], lr=0.1)
    second = torch.optim.SGD([root.a.bias, root.b.bias, *root.c.parameters()], lr=0.1)
    with pytest.raises(
        StrategyError, match=r"optimizer 0 \(SGD\) has parameters in \['a', 'b'\], and no module holds them"
    ):
        assign_owners(root, [first, second], {})


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_fp16_on_a_cpu_is_refused(precision: str) -> None:
    with pytest.raises(StrategyError, match=r"\(fp16\) needs CUDA: use 'bf16-mixed' or '32-true' on CPU"):
        quiet_trainer("hybrid_deepspeed", precision=precision, max_steps=1).fit(Regression(), random_batches())


def test_more_processes_than_the_machine_can_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(StrategyError, match="devices=64 CPU processes for 2 cores: use devices<=4"):
        quiet_trainer("hybrid_deepspeed", devices=64)


def test_stage_0_with_bf16_is_refused_with_the_stage_to_use() -> None:
    with pytest.raises(StrategyError, match="ZeRO stage 0 with bf16 .* use stage 1"):
        quiet_trainer(HybridDeepSpeedStrategy(stage=0), precision="bf16-mixed", max_steps=1).fit(
            Regression(), random_batches()
        )


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StrategyError, match="ZeRO stage must be 0, 1, 2 or 3; got 4"):
        HybridDeepSpeedStrategy(stage=4)


def test_accumulation_inside_the_deepspeed_config_is_refused() -> None:
    strategy = HybridDeepSpeedStrategy(config={"gradient_accumulation_steps": 4})
    with pytest.raises(StrategyError, match="gradient accumulation belongs to the Trainer"):
        quiet_trainer(strategy, max_steps=1).fit(GAN(), random_batches())


def test_a_step_without_a_loss_is_refused() -> None:
    class Skipping(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.raises(StrategyError, match="training_step returned None"):
        quiet_trainer("hybrid_deepspeed", max_steps=1).fit(Skipping(), random_batches())


def test_clipping_by_value_is_refused() -> None:
    with pytest.raises(StrategyError, match="clips by norm"):
        quiet_trainer("hybrid_deepspeed", max_steps=1, gradient_clip_val=1.0, gradient_clip_algorithm="value").fit(
            Regression(), random_batches()
        )
