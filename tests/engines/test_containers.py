"""Containers inside an engine: at every ZeRO stage they read the weights as they are trained, and leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import Rollout, SamplingParams
from lightning_hybrid.models import Policy, load_policy
from tests.containers.models import ONE_OF_EACH, variant
from tests.engines.hybrids import hybrid, step, whole
from tests.helpers import tiny_policy

PROMPTS = [[5, 10, 20], [7, 8], [9], [4, 5, 6, 7, 8, 9, 10]]
SAMPLED = SamplingParams(8, eos_ids=(3,), n=2, entropy=True)
STAGES = [(0, True), (1, True), (2, True), (3, True), (3, False)]
# Every family meets every stage when asked to (-m slow); by default those where weights are held in different ways.
MATRIX = [pytest.param(*stage, marks=() if stage in STAGES[2:4] else pytest.mark.slow) for stage in STAGES]

pytestmark = pytest.mark.usefixtures("alone_in_group")


def rolled_out(engine: Any, sampling: SamplingParams = SAMPLED, seed: int = 0) -> Rollout:
    engine.eval()
    return engine.sample(PROMPTS, sampling, seed)


@torch.no_grad()
def assert_as_in_training(policy: Policy, rollout: Rollout, tolerance: float) -> None:
    output = policy(rollout.tokens, rollout.attention_mask, rollout.response_mask)
    torch.testing.assert_close(rollout.policy_logprobs, output.logprobs, rtol=0, atol=tolerance)
    torch.testing.assert_close(rollout.entropies, output.entropy, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("stage", "pin"), MATRIX)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_logprobs_and_entropies_are_those_of_the_training_forward_after_a_step(
    name: str, stage: int, pin: bool
) -> None:
    policy = Policy(variant(name))
    engine = hybrid(policy, stage, pin_parameters=pin)
    step(engine, policy)
    assert_as_in_training(policy, rolled_out(engine), 2e-5)


# ZeRO stage 0 is refused in bf16.
@pytest.mark.parametrize(
    ("stage", "pin"),
    [pytest.param(*stage, marks=() if stage == (2, True) else pytest.mark.slow) for stage in STAGES[1:]],
)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bf16_logprobs_are_those_of_the_training_forward_up_to_rounding(name: str, stage: int, pin: bool) -> None:
    policy = Policy(variant(name))
    engine = hybrid(policy, stage, "bf16-true", pin_parameters=pin)
    step(engine, policy)
    rollout = rolled_out(engine)
    output = policy(rollout.tokens, rollout.attention_mask, rollout.response_mask)
    difference = (rollout.policy_logprobs - output.logprobs).abs()[rollout.response_mask]
    # Logits reach ±8 in these models, where neighbouring bf16 numbers are 0.03 apart.
    assert difference.mean() < 0.05


@pytest.mark.parametrize(("stage", "pin"), STAGES)
def test_the_real_models_logprobs_differ_by_less_than_a_millionth(shared: Path, stage: int, pin: bool) -> None:
    policy = load_policy(shared / "models" / "tinystories-656k")
    engine = hybrid(policy, stage, pin_parameters=pin)
    engine.eval()
    rollout = engine.sample([[1, 30 + i, 40] for i in range(16)], SamplingParams(100), 0)
    with torch.no_grad():
        output = policy(rollout.tokens, rollout.attention_mask, rollout.response_mask)
    difference = (rollout.policy_logprobs - output.logprobs).abs()[rollout.response_mask]
    assert difference.mean() < 1e-6


@pytest.mark.parametrize(
    ("stage", "pin"),
    [pytest.param(*pair, marks=[] if pair == (3, True) else pytest.mark.slow) for pair in STAGES],
)
def test_fifty_alternations_always_see_the_new_weights_and_train_as_if_nothing_had_been_generated(
    stage: int, pin: bool
) -> None:
    results = []
    for generates in (True, False):
        policy = tiny_policy()
        engine = hybrid(policy, stage, pin_parameters=pin)
        for i in range(50):
            step(engine, policy, seed=i)
            if generates:
                assert_as_in_training(policy, rolled_out(engine, seed=i), 2e-5)
        results.append(whole(policy))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_sets_of_projections_are_one_product_over_the_trained_tensors(name: str, stage: int) -> None:
    policy = Policy(variant(name))
    engine = hybrid(policy, stage)
    decoder = engine._bound()
    held = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    for layer in decoder.layers:
        for projection in (layer.qkv, layer.attention_out, layer.mlp_in, layer.mlp_out):
            assert projection.whole
            assert projection.weight.untyped_storage().data_ptr() in held
    assert engine.extra_weight_bytes == 0


def test_projections_that_do_not_lie_together_are_products_of_their_own_and_never_copies() -> None:
    policy = tiny_policy()
    policy.model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    engine = hybrid(policy, stage=2)
    decoder = engine._bound()
    assert [layer.qkv.whole for layer in decoder.layers] == [False, True]
    step(engine, policy)
    assert_as_in_training(policy, rolled_out(engine), 2e-5)


def test_memory_beyond_the_weights_is_nothing_one_copy_or_one_layer() -> None:
    policy = tiny_policy()
    bytes_of = {p: p.numel() * p.element_size() for p in policy.parameters()}
    model = sum(bytes_of.values())
    layer = sum(bytes_of[p] for p in policy.model.model.layers[0].parameters())
    extra = {}
    for stage, pin in STAGES:
        engine = hybrid(tiny_policy(), stage, pin_parameters=pin)
        rolled_out(engine)
        extra[stage, pin] = engine.extra_weight_bytes
    assert [extra[stage, True] for stage in (0, 1, 2)] == [0, 0, 0]
    assert extra[3, True] == model
    assert extra[3, False] == layer


def test_memory_after_training_resumes_is_what_it_was_before_generation() -> None:
    engine = hybrid(tiny_policy(), 3, release_inference_cache=True)
    engine.train()
    before = storages()
    rolled_out(engine)
    engine.train()
    assert storages() == before


def storages() -> int:
    """Bytes of all tensors alive."""
    import gc

    gc.collect()
    alive = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.layout == torch.strided)
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}.values())


@pytest.mark.parametrize("release", [False, True])
def test_the_cache_is_kept_between_rollouts_unless_told_otherwise(release: bool) -> None:
    engine = hybrid(tiny_policy(), release_inference_cache=release)
    rolled_out(engine)
    first = engine._workspace
    engine.train()
    rolled_out(engine)
    assert (engine._workspace is first) is not release


def test_a_prompt_that_does_not_fit_the_workspace_is_refused_with_the_key_to_raise() -> None:
    engine = hybrid(tiny_policy(), max_out_tokens=12)
    engine.eval()
    with pytest.raises(
        RolloutError, match=r"prompt 3 has 7 tokens; with max_new_tokens=8 .* hybrid_engine.max_out_tokens = 12 tokens"
    ):
        engine.sample(PROMPTS, SAMPLED, 0)
    assert engine.module.training


@pytest.mark.parametrize("prompts", [[], [[5], []]], ids=["no prompts", "an empty prompt"])
def test_prompts_without_tokens_are_refused_and_the_engine_trains_on(prompts: list[list[int]]) -> None:
    policy = tiny_policy()
    engine = hybrid(policy)
    engine.eval()
    with pytest.raises(RolloutError, match="no prompts: give at least one|prompt 1 is empty"):
        engine.sample(prompts, SAMPLED, 0)
    step(engine, policy)


@pytest.mark.parametrize("stage", [2, 3])
def test_numbers_that_stop_being_finite_are_traced_to_their_layer_and_step(stage: int) -> None:
    policy = tiny_policy()
    policy.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    engine = hybrid(policy, stage)
    engine.eval()
    with pytest.raises(
        RolloutError, match=r"logits of prompt 0 are not finite at step 1; .* first go wrong in layer 1"
    ):
        engine.sample(PROMPTS, SAMPLED, 0)
    assert engine.module.training


def test_ragged_prompts_and_more_of_them_than_slots_give_the_same_responses() -> None:
    engine = hybrid(tiny_policy())
    engine.eval()
    prompts = [list(range(3, 4 + i % 20)) for i in range(40)]
    sampling = SamplingParams(12, eos_ids=(3, 4))
    plenty = engine.sample(prompts, sampling, 5)
    few = engine.sample(prompts, sampling, 5, max_tokens_in_flight=3 * 32)
    alone = engine.sample(prompts[7:8], sampling, 5, indices=[7])
    assert plenty.responses == few.responses
    assert plenty.logprobs == few.logprobs
    assert alone.responses == plenty.responses[7:8]
