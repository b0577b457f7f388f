"""The host may be a pass behind the device, and passes may run over free slots: nobody can tell from the rollout."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import Rollout, SamplingParams, StopTexts, Workspace
from lightning_hybrid.generation.loop import Generation
from lightning_hybrid.generation.slots import ALIVE, EOS, FREE, LENGTH
from lightning_hybrid.models import Policy
from tests.generation.loops import (
    CAPACITY,
    EOS_IDS,
    PROMPTS,
    PaddedSteps,
    assert_same,
    decoder_of,
    generated,
    generation,
)
from tests.helpers import tiny_policy

WAYS = {
    "plain": SamplingParams(12),
    "greedy": SamplingParams(12, temperature=0.0),
    "several of each": SamplingParams(12, n=3),
    "one token": SamplingParams(1, n=2),
    "penalty": SamplingParams(12, repetition_penalty=1.3, min_new_tokens=4, top_k=20),
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def stop_texts() -> StopTexts:
    tokenizer = build_tokenizer()
    return StopTexts([tokenizer.decode([token]) for token in (7, 20)], tokenizer)


@pytest.mark.parametrize("lag", [1, 2, 5])
@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)
def test_a_host_that_hears_late_makes_no_difference(policy: Policy, sampling: SamplingParams, lag: int) -> None:
    at_once = generated(policy, sampling, lag=0)
    assert_same(generated(policy, sampling, lag=lag), at_once)
    assert_same(generated(policy, sampling, lag=lag, slots=64), at_once)


def test_what_is_compared_ends_in_every_way(policy: Policy) -> None:
    rollout = generated(policy, WAYS["plain"], stop=stop_texts())
    assert set(rollout.finish_reasons) == {"eos", "length", "stop"}


@pytest.mark.parametrize("slots", [2, 6, 64])
def test_tokens_drawn_after_a_stop_text_are_cut(policy: Policy, slots: int) -> None:
    sampling = SamplingParams(12, n=2, min_new_tokens=2)
    at_once = generated(policy, sampling, stop=stop_texts(), lag=0, slots=slots)
    assert "stop" in at_once.finish_reasons
    assert_same(generated(policy, sampling, stop=stop_texts(), lag=1, slots=slots), at_once)


def test_entropies_come_late_too(policy: Policy) -> None:
    sampling = SamplingParams(12, entropy=True)
    late, at_once = (generated(policy, sampling, lag=lag).entropies for lag in (1, 0))
    assert torch.equal(late, at_once)


@torch.inference_mode()
def padded(policy: Policy, sampling: SamplingParams, lag: int, slots: int) -> Rollout:
    made = generation(policy, sampling, lag=lag, slots=slots, stop=stop_texts())
    made.steps = PaddedSteps(made.step)
    return made.run()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)
def test_passes_over_free_slots_make_no_difference(policy: Policy, sampling: SamplingParams, lag: int) -> None:
    for slots in (6, 39):
        assert_same(padded(policy, sampling, lag, slots), generated(policy, sampling, stop=stop_texts(), slots=slots))


def test_a_workspace_used_before_makes_no_difference(policy: Policy) -> None:
    fresh = generated(policy, WAYS["penalty"], slots=6)
    workspace = Workspace(decoder_of(policy), 6, CAPACITY)
    for lag in (1, 0, 1):
        assert_same(generated(policy, WAYS["penalty"], workspace=workspace, lag=lag), fresh)
        generated(policy, WAYS["several of each"], workspace=workspace, lag=lag, prompts=PROMPTS[5:])


@torch.inference_mode()
def test_a_row_that_is_not_alive_stays_as_it_is_and_counts_nowhere(policy: Policy) -> None:
    made = generation(policy, SamplingParams(8), slots=5)
    slots, results = made.slots, made.step.results
    slots.assign(0, [1] * 5, [11, 12, 13, 14, 15], [0, 1, 2, 3, 4])
    slots.status[:] = torch.tensor([ALIVE, EOS, FREE, LENGTH, ALIVE])
    slots.length[:] = torch.tensor([3, 0, 0, 0, 2])
    slots.produced[:] = torch.tensor([1, 2, 0, 8, 1])
    results.policy.fill_(7.0)
    for _ in range(3):
        made.step.advance(5, [CAPACITY - 1] * 5)
    assert slots.status[1:4].tolist() == [EOS, FREE, LENGTH]
    assert slots.length[1:4].tolist() == [0, 0, 0]
    assert slots.produced[1:4].tolist() == [2, 0, 8]
    assert (results.policy[1:4] == 7.0).all()
    assert (results.policy[0, 1:4] != 7.0).any()


@pytest.mark.parametrize("lag", [0, 1])
def test_ranks_are_asked_before_every_pass_and_wait_for_the_slowest(policy: Policy, lag: int) -> None:
    rounds = itertools.count()
    asked: list[bool] = []

    def any_rank(working: bool) -> bool:
        asked.append(working)
        return next(rounds) < 90

    with torch.inference_mode():
        made = generation(policy, SamplingParams(12), any_rank=any_rank, lag=lag)
        passes = count_passes(made)
        rollout = made.run()
    assert len(asked) == 91
    assert asked[0]
    assert not asked[-1]
    assert asked == sorted(asked, reverse=True)  # once without work, always without
    assert passes["token"] + passes["nothing"] == 90
    assert_same(rollout, generated(policy, SamplingParams(12)))


def count_passes(made: Generation) -> dict[str, int]:
    """How many passes drew tokens, and how many only took part."""
    counts = {"token": 0, "nothing": 0}
    decoder = made.decoder
    idle, logits = decoder.idle, decoder.logits

    def counted_idle() -> None:
        counts["nothing"] += 1
        idle()

    def counted_logits(hidden: torch.Tensor) -> torch.Tensor:
        counts["token"] += 1
        return logits(hidden)

    decoder.idle, decoder.logits = counted_idle, counted_logits  # type: ignore[method-assign]
    return counts


def test_a_last_token_that_is_on_its_way_is_waited_for_not_computed_past(policy: Policy) -> None:
    counts = []
    for lag in (0, 1):
        with torch.inference_mode():
            made = generation(policy, SamplingParams(9), slots=64, lag=lag, prompts=[[4 + i % 3] for i in range(8)])
            made.step.sampler.eos_ids = made.step.sampler.eos_ids[:0]  # all end by length, together
            passes = count_passes(made)
            made.run()
        counts.append(passes["token"])
    assert counts == [9, 9]


@pytest.mark.parametrize("lag", [0, 1])
def test_numbers_that_are_not_finite_are_refused_with_step_and_layer(lag: int) -> None:
    broken = tiny_policy()
    token = EOS_IDS[0] + 1  # the prompt's only token: it goes wrong as soon as another one comes
    with torch.no_grad():
        broken.model.model.embed_tokens.weight[:token] = torch.nan
        broken.model.model.embed_tokens.weight[token + 1 :] = torch.nan
    with pytest.raises(RolloutError, match="logits of prompt 0 are not finite at step 2; .* in the embedding"):
        generated(broken, SamplingParams(8, eos_ids=()), lag=lag, prompts=[[token]])
