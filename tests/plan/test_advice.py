"""Advice: what leaves the result as it is comes first, and what does not says so."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_hybrid.plan import Advice, advise, render
from tests.plan.plans import GPU_RUN, plan_of


def advice_by_setting(device: float, **changes: Any) -> dict[str, Advice]:
    """Changes by the first thing that the command line takes."""
    advice = advise(plan_of(GPU_RUN, **changes, device_memory_gib=device))
    return {item.overrides[0]: item for item in advice}


def test_layers_computed_twice_and_shared_frozen_models_cost_nothing_of_the_result() -> None:
    run = {"algorithm": {"micro_batch_size": 8}, "trainer": {"devices": 4}}
    advice = advice_by_setting(2.0, **run)
    for setting in ("roles.actor.gradient_checkpointing=true", "roles.reference.zero_stage=3"):
        assert advice[setting].costs == ()
        assert advice[setting].saved > 0
    twice = {"actor": {"gradient_checkpointing": True}, "reference": {"zero_stage": 3}}
    assert not {*advice_by_setting(2.0, **run, roles=twice)} & {
        "roles.actor.gradient_checkpointing=true",
        "roles.reference.zero_stage=3",
    }


@pytest.mark.parametrize(
    ("setting", "costs", "changes"),
    [
        ("adapter=lora", "trains an adapter in place of the policy's weights", {}),
        (
            "adapter@model.critic_adapter=lora",
            "trains an adapter and the head in place of the critic's weights",
            {},
        ),
        (
            "algorithm.group_size=8",
            "compares 8 responses to a prompt, not 16",
            {
                "algorithm": {"name": "grpo", "group_size": 16, "micro_batch_size": 128},
                "rollout": {"max_new_tokens": 1},
            },
        ),
        (
            "algorithm.reference=false",
            "the KL is no longer logged",
            {"algorithm": {"name": "grpo", "kl_coef": 0.0}},
        ),
        (
            "ptx.batch_size=8",
            "a step reads 8 texts of the PTX loss, not 16",
            {"algorithm": {"ptx_coef": 0.5}, "ptx": {"path": "texts", "batch_size": 16, "max_length": 512}},
        ),
        ("callbacks.ema_decay=null", "no average of the weights is written", {"callbacks": {"ema_decay": 0.99}}),
    ],
)
def test_what_changes_the_result_says_so(setting: str, costs: str, changes: dict[str, Any]) -> None:
    plan = plan_of(GPU_RUN, **changes, device_memory_gib=2.0)
    advice = advise(plan)
    given = next(item for item in advice if item.overrides == (setting,))
    assert given.costs == (costs,)
    line = next(line for line in render(plan, advice).splitlines() if line.strip().startswith(setting + " "))
    assert line.endswith(f"but {costs}")


@pytest.mark.slow
def test_several_changes_together_leave_the_result_as_it_is_where_that_is_enough() -> None:
    advice = advise(plan_of(GPU_RUN, trainer={"devices": 4}, device_memory_gib=0.6))
    together = advice[-1]
    assert len(together.overrides) > 1
    assert together.plan.fits
    assert together.costs == ()


@pytest.mark.slow
def test_where_it_is_not_enough_they_say_what_they_change() -> None:
    plan = plan_of(GPU_RUN, device_memory_gib=0.23)
    together = advise(plan)[-1]
    assert len(together.overrides) > 1
    assert together.costs
    assert all(cost in render(plan, [together]) for cost in together.costs)
