"""When steps are captured, when captures serve again, and when they do not: on a CPU, where graphs are plain calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_hybrid.generation import SamplingParams, Workspace
from lightning_hybrid.generation import step as step_module
from lightning_hybrid.generation import workspace as workspace_module
from lightning_hybrid.generation.graphs import GraphSteps, ladder, rung
from lightning_hybrid.models import Policy
from tests.generation.loops import (
    CAPACITY,
    EOS_IDS,
    PretendedStudio,
    assert_same,
    decode_of_any_length,
    decoder_of,
    generated,
    generation,
)
from tests.helpers import tiny_policy

SAMPLING = SamplingParams(24, n=3)
GREEDY = SamplingParams(24, temperature=0.0)


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setattr(workspace_module, "graphs_serve", lambda decoder: True)
    monkeypatch.setattr(workspace_module, "Studio", PretendedStudio)
    monkeypatch.setattr(step_module, "make_decode", decode_of_any_length)
    return tiny_policy()


def workspace_of(policy: Policy, slots: int = 24) -> Workspace:
    return Workspace(decoder_of(policy), slots, CAPACITY)


def steps_of(workspace: Workspace, policy: Policy, sampling: SamplingParams = SAMPLING, rows: int = 39) -> GraphSteps:
    steps = workspace.steps(decoder_of(policy), sampling, EOS_IDS, rows)
    assert isinstance(steps, GraphSteps)
    return steps


def expected(policy: Policy, sampling: SamplingParams = SAMPLING) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace_module, "graphs_serve", lambda decoder: False)
        return generated(policy, sampling, slots=24, lag=0)


def test_the_ladder_rises_to_all_slots() -> None:
    assert ladder(1) == [1]
    assert ladder(8) == [4, 8]
    assert ladder(100) == [4, 8, 16, 24, 32, 48, 64, 96, 100]
    assert ladder(256) == [4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert [rung(ladder(100), rows) for rows in (1, 4, 5, 97)] == [4, 4, 8, 100]


@pytest.mark.parametrize("lag", [0, 1])
def test_replays_draw_what_plain_steps_draw(policy: Policy, lag: int) -> None:
    for sampling in (SAMPLING, GREEDY):
        assert_same(generated(policy, sampling, slots=24, lag=lag), expected(policy, sampling))


def test_a_size_runs_once_as_it_is_is_captured_the_second_time_and_replayed_from_then_on(policy: Policy) -> None:
    workspace = workspace_of(policy)
    steps = steps_of(workspace, policy)
    with torch.inference_mode():
        for _ in range(4):
            steps(3, [])
            steps(17, [])
    assert (steps.studio.rehearsals, steps.studio.captures) == (2, 2)
    assert sorted(steps.graphs) == [4, 24]


def test_graphs_serve_again_after_the_optimizer_changed_weights_in_place(policy: Policy) -> None:
    workspace = workspace_of(policy)
    generated(policy, SAMPLING, workspace=workspace)
    generated(policy, SAMPLING, workspace=workspace)
    captures = steps_of(workspace, policy).studio.captures
    assert captures
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert_same(generated(policy, SAMPLING, workspace=workspace), expected(policy))
    assert steps_of(workspace, policy).studio.captures == captures


def test_two_ways_of_sampling_are_kept_in_shared_memory(policy: Policy) -> None:
    workspace = workspace_of(policy)
    train, evaluation = steps_of(workspace, policy), steps_of(workspace, policy, GREEDY)
    assert train.studio is evaluation.studio
    assert steps_of(workspace, policy) is train
    assert steps_of(workspace, policy, GREEDY) is evaluation
    third = steps_of(workspace, policy, SamplingParams(24, top_k=3))
    assert third.studio is not train.studio  # memory of graphs that are gone
    assert steps_of(workspace, policy) is not train


class Devices(TorchDispatchMode):
    """The devices of all tensors that operations take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        met = (x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        self.met |= {tensor.device.type for tensor in met}
        return result


EVERYTHING = SamplingParams(
    9,
    temperature=0.7,
    top_k=9,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.2,
    min_new_tokens=2,
    entropy=True,
)


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY, EVERYTHING])
def test_a_step_neither_reads_from_its_device_nor_copies_to_it(policy: Policy, sampling: SamplingParams) -> None:
    policy.to("meta")  # whose tensors have no values that could be read
    with torch.inference_mode():
        made = generation(policy, sampling, slots=8)
        with Devices() as devices:
            made.step.advance(8, [])
    assert devices.met == {"meta"}


def moved(policy: Policy) -> None:
    norm = policy.model.model.norm
    norm.weight.data = norm.weight.data.clone()


def laid_out_anew(policy: Policy) -> None:
    projection = policy.model.model.layers[1].mlp.down_proj
    projection.weight.data = projection.weight.data.clone()


def other_frequencies(policy: Policy) -> None:
    policy.model.model.rotary_emb.inv_freq.mul_(0.5)


def other_module(policy: Policy) -> None:
    policy.model.lm_head = nn.Linear(32, policy.config.vocab_size, bias=False)


@pytest.mark.parametrize("change", [moved, laid_out_anew, other_frequencies, other_module])
def test_graphs_are_dropped_when_what_they_point_to_moves(policy: Policy, change: Callable[[Policy], None]) -> None:
    workspace = workspace_of(policy)
    before = steps_of(workspace, policy)
    steps_of(workspace, policy, GREEDY)
    change(policy)
    after = steps_of(workspace, policy)
    assert after is not before
    assert after.studio is not before.studio
    assert_same(generated(policy, SAMPLING, workspace=workspace), expected(policy))


def test_a_few_more_responses_need_no_new_graphs_and_many_more_do(policy: Policy) -> None:
    workspace = workspace_of(policy)
    before = steps_of(workspace, policy, rows=39)
    assert steps_of(workspace, policy, rows=64) is before
    assert steps_of(workspace, policy, rows=65) is not before


def test_graphs_of_copied_weights_last_for_one_call(policy: Policy) -> None:
    workspace = workspace_of(policy)
    decoder = decoder_of(policy)
    decoder.weights.lasting = False
    first, second = (workspace.steps(decoder, SAMPLING, EOS_IDS, 39) for _ in range(2))
    assert isinstance(first, GraphSteps)
    assert first is not second


def test_a_larger_workspace_serves_a_smaller_call(policy: Policy) -> None:
    workspace, decoder = workspace_of(policy, 24), decoder_of(policy)
    assert workspace.fits(decoder, 7, CAPACITY)
    assert not workspace.fits(decoder, 25, CAPACITY)
    assert not workspace.fits(decoder, 24, 2 * workspace.cache.capacity)
    assert not workspace.fits(decoder, 24, 8)
