"""Decode steps in CUDA graphs: they draw what plain steps draw, follow the optimizer, and never make the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.generation import Rollout, SamplingParams, StopTexts, Workspace
from lightning_hybrid.generation.graphs import GraphSteps
from lightning_hybrid.generation.loop import Generation
from lightning_hybrid.models import Policy
from tests.generation.loops import CAPACITY, EOS_IDS, PaddedSteps, decoder_of, generated, generation
from tests.helpers import tiny_policy

pytestmark = pytest.mark.gpu

EVERYTHING = SamplingParams(
    24,
    n=3,
    temperature=0.8,
    top_k=30,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    min_new_tokens=2,
    entropy=True,
)
WAYS = {"plain": SamplingParams(24, n=3), "greedy": SamplingParams(24, temperature=0.0), "everything": EVERYTHING}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return tiny_policy(head_dim=16).to("cuda", request.param)


def workspace_of(policy: Policy, slots: int = 24) -> Workspace:
    return Workspace(decoder_of(policy), slots, CAPACITY)


def captured(workspace: Workspace, policy: Policy, sampling: SamplingParams) -> GraphSteps:
    rows = 13 * sampling.n
    steps = workspace.steps(decoder_of(policy), sampling, EOS_IDS, rows)
    assert isinstance(steps, GraphSteps)
    return steps


@torch.inference_mode()
def eager(policy: Policy, sampling: SamplingParams, slots: int = 24, lag: int = 0) -> Rollout:
    """The same shapes, launched one kernel at a time."""
    made = generation(policy, sampling, slots=slots, lag=lag)
    made.steps = PaddedSteps(made.step)
    return made.run()


def assert_alike(a: Rollout, b: Rollout) -> None:
    assert a.responses == b.responses
    assert a.finish_reasons == b.finish_reasons
    for name in ("policy_logprobs", "sampling_logprobs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)
def test_captured_steps_draw_what_plain_steps_draw(policy: Policy, sampling: SamplingParams) -> None:
    workspace = workspace_of(policy)
    for _ in range(3):  # captures, then nothing but replays
        assert_alike(generated(policy, sampling, workspace=workspace), eager(policy, sampling))
    assert len(captured(workspace, policy, sampling).graphs) > 2


def test_the_trained_model_gives_the_log_probs_that_captured_steps_gave(policy: Policy) -> None:
    rollout = generated(policy, WAYS["plain"], workspace=workspace_of(policy)).usable_in_training()
    with torch.no_grad():
        trained = policy(rollout.tokens, rollout.attention_mask, rollout.response_mask).logprobs
    gap = (trained - rollout.policy_logprobs)[rollout.response_mask].abs()
    assert gap.max() < (1e-4 if policy.model.dtype == torch.float32 else 0.1)


def test_captured_steps_follow_the_optimizer(policy: Policy) -> None:
    sampling, workspace = WAYS["plain"], workspace_of(policy)
    for _ in range(2):
        before = generated(policy, sampling, workspace=workspace)
    graphs = dict(captured(workspace, policy, sampling).graphs)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    for parameter in policy.parameters():
        parameter.grad = 0.05 * torch.randn_like(parameter)
    optimizer.step()
    after = generated(policy, sampling, workspace=workspace)
    assert after.responses != before.responses
    assert_alike(after, eager(policy, sampling))
    kept = captured(workspace, policy, sampling).graphs
    assert all(kept[size] is graph for size, graph in graphs.items())


def test_a_response_does_not_depend_on_the_slots_or_on_when_the_host_hears() -> None:
    policy, sampling = tiny_policy(head_dim=16).to("cuda"), WAYS["plain"]
    rollouts = [generated(policy, sampling, slots=slots, lag=lag) for slots in (39, 7) for lag in (1, 0)]
    for other in rollouts[1:]:
        assert_alike(other, rollouts[0])


def test_stop_texts_end_captured_responses() -> None:
    policy, tokenizer = tiny_policy(head_dim=16).to("cuda"), build_tokenizer()
    stop = StopTexts([tokenizer.decode([7])], tokenizer)
    workspace = workspace_of(policy)
    late, at_once = (generated(policy, WAYS["plain"], workspace=workspace, stop=stop, lag=lag) for lag in (1, 0))
    assert "stop" in late.finish_reasons
    assert_alike(late, at_once)


def test_the_host_never_waits_for_a_token(policy: Policy) -> None:
    sampling = SamplingParams(24, n=3, eos_ids=())
    workspace = workspace_of(policy, slots=39)
    with torch.inference_mode():
        made = generation(policy, sampling, workspace=workspace, prompts=[[5, 6]] * 13)
        made.step.sampler.eos_ids = made.step.sampler.eos_ids[:0]  # all live to the end
        made._admit()
        for _ in range(4):  # compiles, captures
            pass_once(made)
        with waiting_forbidden():
            for _ in range(10):
                pass_once(made)


def test_the_host_does_not_wait_when_rows_end_and_prompts_take_their_slots() -> None:
    policy, sampling = tiny_policy(head_dim=16).to("cuda"), SamplingParams(24, n=3, repetition_penalty=1.1)
    workspace = workspace_of(policy, slots=8)
    for _ in range(2):
        generated(policy, sampling, workspace=workspace)
    with torch.inference_mode():
        made = generation(policy, sampling, workspace=workspace)
        with waiting_forbidden():
            while made.live or made.waiting:
                launched = made._launch()
                made._settle(made.lag if launched else 0)


def pass_once(made: Generation) -> None:
    made._advance()
    made._settle(made.lag)


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
