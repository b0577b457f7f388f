"""A policy with its adapters switched off, through its engine: the base, and the policy again afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.generation import SamplingParams, generate
from lightning_hybrid.models import AdaptersOff, Policy, with_adapter
from tests.conftest import RunRanks
from tests.engines.hybrids import hybrid, step, whole
from tests.models.test_policy import batch, family

PROMPTS = [[5, 10, 20], [7, 8], [9]]
GREEDY = SamplingParams(6, temperature=0, eos_ids=())
ADAPTERS = {
    "lora": AdapterConfig(r=4, alpha=16),
    "rslora": AdapterConfig(kind="rslora", r=4, target_modules=["q_proj", "v_proj"], dropout=0.5),
    "dora": AdapterConfig(kind="dora", r=4),
}


def fresh(kind: str, family_name: str = "llama") -> tuple[Policy, Policy]:
    """A base, and a policy of its own with adapters on the same weights."""
    model = family(family_name)
    torch.manual_seed(3)
    return Policy(copy.deepcopy(model)), with_adapter(Policy(model), ADAPTERS[kind])


@pytest.mark.usefixtures("alone_in_group")
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("lora", 0),
        ("rslora", 2),
        ("dora", 3),
        *(pytest.param("lora", stage, marks=pytest.mark.slow) for stage in (1, 2, 3)),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("rslora", "dora")),
        pytest.param("rslora", 3, marks=pytest.mark.slow),
    ],
)
def test_the_base_answers_bit_for_bit_while_the_adapters_learn(kind: str, stage: int) -> None:
    base, policy = fresh(kind)
    engine = hybrid(policy, stage)
    reference = AdaptersOff(policy)
    expected = base(*batch())
    for i in range(3):
        engine.train()
        output = reference(*batch())
        assert torch.equal(output.logprobs, expected.logprobs)
        assert torch.equal(output.entropy, expected.entropy)
        assert not output.logprobs.requires_grad
        step(engine, policy, seed=i)
    moved = policy.eval()(*batch()).logprobs
    assert (moved - expected.logprobs).abs().max() > 1e-3


@pytest.mark.usefixtures("alone_in_group")
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_in_bf16_the_base_is_that_of_the_engine(stage: int) -> None:
    base, policy = fresh("lora")
    engine = hybrid(policy, stage, "bf16-true")
    step(engine, policy)
    expected = base.bfloat16()(*batch())
    assert torch.equal(AdaptersOff(policy)(*batch()).logprobs, expected.logprobs)


@pytest.mark.usefixtures("alone_in_group")
@pytest.mark.parametrize(
    ("stage", "pin"),
    [
        (2, True),
        (3, False),
        pytest.param(0, True, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)
def test_generation_after_it_sees_the_adapters_again(stage: int, pin: bool) -> None:
    _, policy = fresh("lora")
    engine = hybrid(policy, stage, pin_parameters=pin)
    for i in range(3):
        step(engine, policy, seed=i)
        AdaptersOff(policy)(*batch())
        engine.eval()
        rollout = engine.sample(PROMPTS, GREEDY, seed=0)
        _, plain = fresh("lora")
        plain.load_state_dict(whole(policy))
        expected = generate(plain.model.merge_and_unload().eval(), PROMPTS, GREEDY)
        assert rollout.responses == expected.responses
        torch.testing.assert_close(rollout.policy_logprobs, expected.policy_logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("alone_in_group")
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_training_with_the_base_asked_in_between_is_training_without(stage: int) -> None:
    trained = []
    for asked in (False, True):
        _, policy = fresh("lora")
        engine = hybrid(policy, stage)
        for i in range(3):
            if asked:
                AdaptersOff(policy)(*batch())
            step(engine, policy, seed=i)
        trained.append(whole(policy))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def base_and_policy_on_a_rank(stage: int) -> None:
    """Run by each rank: the base's log-probs before and after steps, with chunks of which ranks have different ones."""
    import deepspeed

    from lightning_hybrid.engines.environment import prepare_deepspeed

    prepare_deepspeed("cpu")
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo", verbose=False)
    base, policy = fresh("lora")
    base.chunk = policy.chunk = 2
    tokens, mask, positions = batch()
    if torch.distributed.get_rank():
        positions[0] = False  # fewer calls of the head
    engine = hybrid(policy, stage)
    for i in range(2):
        output = AdaptersOff(policy)(tokens, mask, positions)
        assert torch.equal(output.logprobs, base(tokens, mask, positions).logprobs)
        step(engine, policy, seed=i)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_on_two_ranks_too(run_ranks: RunRanks, stage: int) -> None:
    run_ranks(base_and_policy_on_a_rank, 2, stage)


@pytest.mark.usefixtures("alone_in_group")
def test_an_exception_while_they_are_off_leaves_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    base, policy = fresh("lora")
    engine = hybrid(policy, 3)
    step(engine, policy)
    policy.model.base_model.model.lm_head.eval()  # a mode of its own comes back, too
    modes = [module.training for module in policy.modules()]
    expected = whole(policy)

    def fail(*_: Any) -> None:
        raise KeyError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "score_hidden", fail)
        with pytest.raises(KeyError, match="in the middle"):
            AdaptersOff(policy)(*batch())
    assert [module.training for module in policy.modules()] == modes
    after = whole(policy)
    assert all(torch.equal(expected[name], after[name]) for name in expected)
    assert not torch.equal(policy(*batch()).logprobs, base(*batch()).logprobs)
