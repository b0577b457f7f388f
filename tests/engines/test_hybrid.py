"""The hybrid engine generates with the weights it trains, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_hybrid.containers import Decoder
from lightning_hybrid.engines import backward, build_engine, engine_config
from lightning_hybrid.errors import RolloutError, StrategyError
from lightning_hybrid.models import Policy
from tests.engines.hybrids import failing_at_the_third_call, hybrid, step, whole
from tests.helpers import tiny_policy
from tests.models.test_policy import FAMILIES, family

PROMPT = torch.tensor([[5, 10, 20], [0, 7, 8]])
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])


pytestmark = pytest.mark.usefixtures("alone_in_group")


def drawn(engine: Any) -> torch.Tensor:
    engine.eval()
    return engine.generate(PROMPT, attention_mask=MASK, do_sample=False, max_new_tokens=6, pad_token_id=0)


@pytest.mark.filterwarnings("ignore:GraniteForCausalLM has no inference container")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_generates_with_the_weights_just_trained(name: str) -> None:
    policy, copy = Policy(family(name)), Policy(family(name))
    engine = hybrid(policy)
    for _ in range(2):
        step(engine, policy)
        copy.load_state_dict(whole(policy))
        expected = copy.model.generate(PROMPT, attention_mask=MASK, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert torch.equal(drawn(engine), expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_building_an_engine_leaves_grouped_query_weights_as_they_are(stage: int) -> None:
    policy = tiny_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    hybrid(policy, stage)
    after = whole(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [1, 3])
def test_every_weight_trains_the_output_head_included(stage: int) -> None:
    policy = tiny_policy()
    engine = hybrid(policy, stage)
    before = whole(policy)
    drawn(engine)
    step(engine, policy)
    after = whole(policy)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


REST = ((0, False), (1, False), (2, False), (3, True))


@pytest.mark.parametrize(
    ("stage", "pin"),
    [(0, True), (1, True), (2, True), (3, False), *(pytest.param(*x, marks=pytest.mark.slow) for x in REST)],
)
def test_training_is_bit_identical_whether_or_not_it_generated_in_between(stage: int, pin: bool) -> None:
    results = []
    for generates in (False, True):
        policy = tiny_policy()
        engine = hybrid(policy, stage, pin_parameters=pin)
        for _ in range(4):
            if generates:
                drawn(engine)
            step(engine, policy)
        results.append(whole(policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_several_hybrid_engines_live_in_one_process() -> None:
    policies = [tiny_policy(seed=0), tiny_policy(seed=1)]
    engines = [hybrid(policy) for policy in policies]
    first = [drawn(engine) for engine in engines]
    assert not torch.equal(first[0], first[1])
    step(engines[0], policies[0])
    assert torch.equal(drawn(engines[1]), first[1])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("by_itself", [False, True], ids=["containers", "the model itself"])
def test_an_exception_while_generating_leaves_a_trainable_model(
    stage: int, by_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    engine = hybrid(policy, stage)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("in the middle")

    engine.eval()
    if by_itself:
        handle = policy.model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(KeyError, match="in the middle"):
            engine.generate_with_model(PROMPT, attention_mask=MASK, max_new_tokens=4, pad_token_id=0)
        handle.remove()
    else:
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "logits", failing_at_the_third_call(Decoder.logits))
            with pytest.raises(KeyError, match="in the middle"):
                engine.generate(PROMPT, attention_mask=MASK, max_new_tokens=4, pad_token_id=0)
        assert engine.module.training
    before = whole(policy)
    step(engine, policy)
    after = whole(policy)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert drawn(engine).shape == (2, 9)


def test_the_phase_clock_says_what_deepspeed_prints() -> None:
    policy = tiny_policy()
    engine = hybrid(policy)
    assert engine.timings.metrics() == {}
    drawn(engine)
    step(engine, policy)
    engine.eval()
    figures = engine.timings.metrics()
    parts = ("gather_seconds", "generate_seconds", "training_seconds", "other_seconds")
    assert figures["end_to_end_seconds"] == pytest.approx(sum(figures[part] for part in parts))
    assert figures["samples_per_second"] == pytest.approx(2 / figures["end_to_end_seconds"])
    assert min(figures["generate_seconds"], figures["training_seconds"]) > 0


def test_a_family_without_a_container_generates_by_itself_and_says_so() -> None:
    policy = Policy(family("granite"))
    engine = hybrid(policy)
    with pytest.warns(UserWarning, match="GraniteForCausalLM has no inference container .* model type 'granite'"):
        drawn(engine)


def test_generating_in_training_mode_is_refused() -> None:
    engine = hybrid(tiny_policy())
    engine.train()
    with pytest.raises(RolloutError, match=r"training mode: call engine\.eval\(\) before generate\(\)"):
        engine.generate(PROMPT, max_new_tokens=2)


def test_a_module_that_cannot_generate_is_refused() -> None:
    module = nn.Linear(2, 2)
    config = engine_config(stage=1, precision="32-true", hybrid_engine={})
    engine = build_engine(module, torch.optim.SGD(module.parameters(), lr=0.1), config, hybrid=True)
    engine.eval()
    with pytest.raises(RolloutError, match="Linear has no 'generate'; the hybrid engine needs a causal LM"):
        engine.generate(PROMPT)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_keeps_fp32_master_weights(precision: str) -> None:
    """A hundred steps too small for bf16 to show one by one add up."""
    module = nn.Linear(4, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    config = engine_config(stage=2, precision=precision)
    engine = build_engine(module, torch.optim.SGD(module.parameters(), lr=1e-4), config)
    for _ in range(100):
        backward(module(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum(), [engine])
        engine.step()
    torch.testing.assert_close(module.weight.float(), torch.full((1, 4), 0.99), rtol=0, atol=4e-3)


def test_offload_needs_no_compiled_optimizer() -> None:
    policy = tiny_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    config = engine_config(stage=2, precision="32-true", offload_optimizer=True)
    engine = build_engine(policy, optimizer, config)
    before = whole(policy)
    step(engine, policy)
    assert not torch.equal(before["model.lm_head.weight"], whole(policy)["model.lm_head.weight"])


def test_a_config_that_deepspeed_trains_wrong_is_refused() -> None:
    policy = tiny_policy()
    optimizer = torch.optim.AdamW(policy.parameters())
    with pytest.raises(StrategyError, match="ZeRO stage 0 with fp16"):
        build_engine(policy, optimizer, engine_config(stage=0, precision="16-mixed"))
