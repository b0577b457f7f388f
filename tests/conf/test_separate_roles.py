"""Frozen roles in processes of their own: what cannot be is refused before anything is loaded, with the remedy."""

from __future__ import annotations

import pytest

from lightning_hybrid.config import PPORun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError

NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"]


def compose(*overrides: str) -> PPORun:
    return compose_run("ppo", PPORun, [*NEEDED, *overrides])


def test_both_roles_take_a_process_and_a_device() -> None:
    roles = compose("roles.reference.separate=true", "roles.reward={separate: true, device: 3}").roles
    assert (roles.reference.separate, roles.reference.device) == (True, None)
    assert (roles.reward.separate, roles.reward.device) == (True, 3)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["roles.reward.device=1"], "roles.reward.device = 1: is that of a process of its own: set separate=true"),
        (
            ["roles.reference={separate: true, zero_stage: 3}"],
            "roles.reference.zero_stage = 3: is about copies in the ranks",
        ),
        (
            ["roles.reward.separate=true", "reward.path=null", "reward.verify=math"],
            "roles.reward.separate = True: is about reward models: give reward.path or reward.classifier",
        ),
        (
            ["roles.reference.separate=true", "adapter=lora"],
            "roles.reference.separate = True: the actor with its adapters off is the reference",
        ),
        (
            ["roles.reference.separate=true", "algorithm.reference=false", "algorithm.kl_coef=0"],
            "roles.reference.separate = True: needs algorithm.reference=true",
        ),
        (
            ["roles.reference.separate=true", "model=tiny_llama", "model.tokenizer=a-tokenizer", "model.path=null"],
            "roles.reference.separate = True: a process of its own reads it from a folder, and fresh weights are",
        ),
        (
            ["roles.reward.separate=true", "trainer=gpu"],
            "roles.reward.device = None: is the CPU, beside ranks on GPUs: give its CUDA index",
        ),
        (
            ["roles.reference.separate=true", "trainer.num_nodes=2"],
            "roles.reference.separate = True: only the first of trainer.num_nodes=2 would reach it: use launcher=ray",
        ),
        (
            ["rollout=vllm_separate", "trainer.num_nodes=2"],
            "rollout.vllm.colocate = False: only the first of trainer.num_nodes=2 would reach the engines",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(*overrides)
    assert problem in str(refused.value)


def test_terms_may_have_the_models() -> None:
    terms = "reward.terms={taste: {path: a-model}, loops: {penalty: repetition}}"
    assert compose("reward.path=null", terms, "roles.reward.separate=true").roles.reward.separate
