"""Adapters of peft: generation sees base and adapter together, and writes neither."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from lightning_hybrid.containers import Decoder
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import SamplingParams, generate
from lightning_hybrid.models import Policy
from tests.containers.models import ONE_OF_EACH, variant
from tests.engines.hybrids import failing_at_the_third_call, hybrid, step, whole
from tests.models.test_policy import family

PROMPTS = [[5, 10, 20], [7, 8], [9], [4, 5, 6, 7, 8, 9, 10]]
GREEDY = SamplingParams(8, temperature=0, eos_ids=())
# Families with separate projections, with fused ones, and with transposed ones, each with targets of its own.
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "qwen2": "all-linear",
    "gpt2": ["c_attn", "c_fc"],
    "gpt_neox": ["query_key_value", "dense"],
}

pytestmark = pytest.mark.usefixtures("alone_in_group")


def adapted(name: str, rank_stabilized: bool = False, **changes: Any) -> Policy:
    """A tiny model with LoRA adapters that are not zero."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS[name], "use_rslora": rank_stabilized}
    config = peft.LoraConfig(**(settings | changes), fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    model = peft.get_peft_model(family(name), config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return Policy(model)


def base_weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value for name, value in whole(policy).items() if "lora_" not in name}


def merged(policy: Policy, name: str, **changes: Any) -> Any:
    """A plain model with the adapters merged in by peft."""
    copy = adapted(name, **changes)
    copy.load_state_dict(whole(policy))
    return copy.model.merge_and_unload().eval()


STAGES = [(0, True), (1, True), (2, True), (3, True), (3, False)]
# Each family, each stage.
DEFAULT = [("llama", 0, True), ("gpt2", 1, True), *((name, 2, True) for name in TARGETS)]
DEFAULT += [("qwen2", 3, True), ("gpt_neox", 3, False)]


@pytest.mark.parametrize(
    ("name", "stage", "pin"),
    [
        pytest.param(name, *stage, marks=[] if (name, *stage) in DEFAULT else pytest.mark.slow)
        for stage in STAGES
        for name in TARGETS
    ],
)
def test_generation_equals_that_of_the_merged_model_after_every_step(name: str, stage: int, pin: bool) -> None:
    policy = adapted(name)
    engine = hybrid(policy, stage, pin_parameters=pin)
    for i in range(2):
        step(engine, policy, seed=i)
        engine.eval()
        rollout = engine.sample(PROMPTS, GREEDY, seed=0)
        expected = generate(merged(policy, name), PROMPTS, GREEDY)
        assert rollout.responses == expected.responses
        torch.testing.assert_close(rollout.policy_logprobs, expected.policy_logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "pin"),
    [
        (2, True),
        pytest.param(0, True, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(3, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_family_with_adapters_on_all_its_projections_is_as_in_training(name: str, stage: int, pin: bool) -> None:
    policy = all_adapted(name)
    engine = hybrid(policy, stage, pin_parameters=pin)
    step(engine, policy)
    assert difference_from_training(engine, policy).max() < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "pin"), [(2, True), (3, True), (3, False)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_in_bf16_too_up_to_rounding(name: str, stage: int, pin: bool) -> None:
    policy = all_adapted(name)
    engine = hybrid(policy, stage, "bf16-true", pin_parameters=pin)
    step(engine, policy)
    assert difference_from_training(engine, policy).mean() < 0.05


def all_adapted(name: str) -> Policy:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=name.startswith("gpt2"))
    model = peft.get_peft_model(variant(name), config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return Policy(model)


@torch.no_grad()
def difference_from_training(engine: Any, policy: Policy) -> torch.Tensor:
    engine.eval()
    rollout = engine.sample(PROMPTS, SamplingParams(8, eos_ids=(3,), n=2), 0)
    output = policy(rollout.tokens, rollout.attention_mask, rollout.response_mask)
    return (rollout.policy_logprobs - output.logprobs).abs()[rollout.response_mask]


@pytest.mark.parametrize("saved", [["ln_f"], ["ln_1"], ["lm_head"]], ids=str)
def test_modules_trained_in_place_of_the_originals_are_the_ones_that_are_read(saved: list[str]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["c_fc"], modules_to_save=saved, fan_in_fan_out=True)
    policy = Policy(peft.get_peft_model(variant("gpt2"), config))
    engine = hybrid(policy)
    for i in range(3):
        step(engine, policy, seed=i)
    assert difference_from_training(engine, policy).max() < 5e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_on_a_tied_head_leaves_the_embedding_alone(stage: int) -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=False)
    policy = Policy(peft.get_peft_model(variant("llama, tied"), config))
    torch.nn.init.normal_(policy.model.base_model.model.lm_head.lora_B["default"].weight, std=0.3)
    assert difference_from_training(hybrid(policy, stage), policy).max() < 5e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_too_small_to_be_added_to_16_bit_weights_still_count(stage: int) -> None:
    policy = all_adapted("llama")
    engine = hybrid(policy, stage, "bf16-true")
    with_adapters = difference_from_training(engine, policy).mean()
    small = all_adapted("llama")
    for key, parameter in small.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=1e-4)
    assert difference_from_training(hybrid(small, stage, "bf16-true"), small).mean() < max(with_adapters, 5e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_rank_stabilized_adapters_are_scaled_as_in_training(stage: int) -> None:
    policy = adapted("llama", rank_stabilized=True)
    engine = hybrid(policy, stage)
    engine.eval()
    rollout = engine.sample(PROMPTS, GREEDY, seed=0)
    trained = policy(rollout.tokens, rollout.attention_mask, rollout.response_mask).logprobs
    torch.testing.assert_close(rollout.policy_logprobs, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))])
def test_two_hundred_rollouts_and_updates_in_bf16_leave_the_base_as_it_was(stage: int) -> None:
    policy = adapted("llama")
    engine = hybrid(policy, stage, "bf16-true")
    before = base_weights(policy)
    assert all(value.dtype == torch.bfloat16 for value in before.values())
    for i in range(200):
        engine.eval()
        engine.sample(PROMPTS[:2], SamplingParams(2, eos_ids=()), seed=i)
        step(engine, policy, seed=i)
    after = base_weights(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_exception_while_generating_leaves_base_and_adapters_as_they_were(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted("llama")
    engine = hybrid(policy, stage)
    before = whole(policy)
    engine.eval()
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "logits", failing_at_the_third_call(Decoder.logits))
        with pytest.raises(KeyError, match="in the middle"):
            engine.sample(PROMPTS, GREEDY, seed=0)
    assert engine.module.training
    after = whole(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    step(engine, policy)


def test_frozen_bases_lie_together_so_that_one_product_serves_q_k_and_v() -> None:
    engine = hybrid(adapted("llama"), stage=2)
    decoder = engine._bound()
    assert all(layer.qkv.whole and layer.mlp_in.whole for layer in decoder.layers)
    assert engine.extra_weight_bytes == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, r"q_proj: its LoRA adapter is weight-decomposed \(DoRA\)"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: its LoRA adapter is on an embedding"),
        ({"lora_bias": True}, "q_proj: its LoRA adapter has a bias"),
    ],
)
def test_adapters_that_containers_cannot_read_are_refused_by_name(change: dict[str, Any], reason: str) -> None:
    engine = hybrid(adapted("llama", **change))
    engine.eval()
    with pytest.raises(RolloutError, match=reason):
        engine.sample(PROMPTS, GREEDY, seed=0)
