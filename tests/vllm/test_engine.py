"""A real vLLM inside a rank generates with the weights it was last given, and leaves no trace on the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.config import RolloutConfig, VLLMConfig
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.generation import Rollout
from lightning_hybrid.models import Policy, load_policy
from lightning_hybrid.modules.passes import policy_logprobs
from lightning_hybrid.rollout.vllm import VLLMRollout
from lightning_hybrid.rollout.vllm.engine import SleepingEngine
from tests.vllm.wide_heads import perturbed, write_wide_model

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: see .ci/vllm")
pytestmark = pytest.mark.slow

PROMPTS = [[1, 338, 402], [1, 77], [1, 338, 402, 9, 14]]


@pytest.fixture
def policy(shared: Path, tmp_path: Path) -> Policy:
    return load_policy(write_wide_model(shared / "models" / "tinystories-656k", tmp_path / "wide"))


@pytest.fixture
def backend(policy: Policy, alone_in_group: None) -> Iterator[VLLMRollout]:
    made = backend_of(policy)
    yield made
    made.close()


def backend_of(policy: Policy, **changes: Any) -> VLLMRollout:
    config = RolloutConfig(backend="vllm", max_new_tokens=12, vllm=VLLMConfig(kv_cache_gib=0.1), **changes)
    made = VLLMRollout(config, [2], 0)
    made.prepare(policy.model, torch.device("cpu"), torch.float32)
    return made


def gap(policy: Policy, rollout: Rollout, temperature: float = 1.0) -> float:
    """The largest difference of log-probs to the training forward, nats."""
    with torch.no_grad():
        own = policy_logprobs(policy, rollout, 8, temperature)
    return float((own - rollout.sampling_logprobs)[rollout.response_mask].abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_training_forward(policy: Policy, alone_in_group: None, temperature: float) -> None:
    backend = backend_of(policy, temperature=temperature)
    rollout = backend.generate(policy.model, PROMPTS, seed=3, n=2)
    assert rollout.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert gap(policy, rollout, temperature) < 1e-4
    assert rollout.finish_reasons == tuple("eos" if ids[-1] == 2 else "length" for ids in rollout.responses)
    backend.close()


def test_changed_weights_are_what_generates_next(policy: Policy, backend: VLLMRollout) -> None:
    other = Policy(perturbed(policy.model))
    for each in (policy, other, policy):
        assert gap(each, backend.generate(each.model, PROMPTS, seed=3)) < 1e-4
    assert gap(other, backend.generate(policy.model, PROMPTS, seed=3)) > 0.1


def test_a_forgotten_push_shows_in_the_log_probs(
    policy: Policy, backend: VLLMRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.generate(policy.model, PROMPTS, seed=3)
    monkeypatch.setattr(SleepingEngine, "_push", lambda self, weights: None)
    other = Policy(perturbed(policy.model))
    assert gap(other, backend.generate(other.model, PROMPTS, seed=3)) > 0.1


def test_what_was_cached_with_old_weights_would_show_in_the_log_probs(
    policy: Policy, backend: VLLMRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [[1, *range(300, 380)]]  # more than a block
    other = Policy(perturbed(policy.model))
    backend.generate(policy.model, long, seed=3)
    assert gap(other, backend.generate(other.model, long, seed=3)) < 1e-4
    assert backend.engine is not None
    monkeypatch.setattr(backend.engine.llm, "reset_prefix_cache", lambda: True)
    assert gap(policy, backend.generate(policy.model, long, seed=3)) > 0.1


def test_a_response_depends_on_seed_and_index_and_not_on_the_batch(policy: Policy, backend: VLLMRollout) -> None:
    together = backend.generate(policy.model, PROMPTS, seed=3, indices=[4, 5, 6], n=2)
    alone = backend.generate(policy.model, PROMPTS[1:2], seed=3, indices=[5], n=2)
    assert alone.responses == together.responses[2:4]
    other = backend.generate(policy.model, PROMPTS, seed=4, indices=[4, 5, 6], n=2)
    assert other.responses != together.responses


def test_a_response_ends_with_the_first_token_that_ends_one_and_not_before_it_may(
    policy: Policy, alone_in_group: None
) -> None:
    free = backend_of(policy)
    said = free.generate(policy.model, PROMPTS, seed=3).responses
    free.close()
    end = said[0][3]
    ending = VLLMRollout(free.config, [end], 0)
    ending.prepare(policy.model, torch.device("cpu"), torch.float32)
    rollout = ending.generate(policy.model, PROMPTS, seed=3)
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in said]
    assert rollout.responses == expected
    assert rollout.finish_reasons == tuple("eos" if end in ids else "length" for ids in said)
    ending.close()
    patient = VLLMRollout(free.config.model_copy(update={"min_new_tokens": 9}), [end], 0)
    patient.prepare(policy.model, torch.device("cpu"), torch.float32)
    assert all(len(ids) >= 9 for ids in patient.generate(policy.model, PROMPTS, seed=3).responses)
    patient.close()


def test_an_engine_of_before_is_ended_where_another_one_is_started(policy: Policy, alone_in_group: None) -> None:
    left = backend_of(policy)
    engine = left.engine
    assert engine is not None
    other = backend_of(policy)  # as after a fit that an exception ended
    assert engine.llm is None
    assert gap(policy, other.generate(policy.model, PROMPTS, seed=3)) < 1e-4
    left.close()
    other.close()


def test_what_vllm_refuses_is_said_and_the_next_start_works(policy: Policy, alone_in_group: None) -> None:
    config = RolloutConfig(backend="vllm", vllm=VLLMConfig(options={"max_model_len": 10**6}))
    with pytest.raises(ConfigError, match=r"(?s)vLLM .* did not start for LlamaForCausalLM: .*look at rollout\.vllm"):
        VLLMRollout(config, [2], 0).prepare(policy.model, torch.device("cpu"), torch.float32)
    backend = backend_of(policy)
    assert gap(policy, backend.generate(policy.model, PROMPTS, seed=3)) < 1e-4
    backend.close()


def test_greedy_responses_are_the_most_probable_tokens(policy: Policy, backend: VLLMRollout) -> None:
    rollout = backend.generate(policy.model, PROMPTS[:1], seed=3, greedy=True)
    ids = torch.tensor([[*PROMPTS[0], *rollout.responses[0]]])
    with torch.no_grad():
        best = policy.model(ids).logits[0].argmax(-1)
    begin = len(PROMPTS[0]) - 1
    assert rollout.responses[0] == best[begin : begin + len(rollout.responses[0])].tolist()


def test_an_engine_leaves_the_process_as_it_was(policy: Policy, alone_in_group: None) -> None:
    torch.set_num_threads(1)
    state, threads, set_threads = torch.get_rng_state(), torch.get_num_threads(), torch.set_num_threads
    for _ in range(2):  # a second one works like the first
        backend = backend_of(policy)
        assert gap(policy, backend.generate(policy.model, PROMPTS, seed=3)) < 1e-4
        backend.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, set_threads)
    assert torch.distributed.is_initialized()


def test_an_engine_that_fails_is_started_anew_and_one_that_fails_again_stops_the_run(
    policy: Policy, backend: VLLMRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = backend.generate(policy.model, PROMPTS, seed=3)
    first = backend.engine
    assert first is not None
    monkeypatch.setattr(first.llm, "generate", _broken)
    with pytest.warns(UserWarning, match="vLLM failed, and its engines are started anew, once: .*the core is gone"):
        again = backend.generate(policy.model, PROMPTS, seed=3)
    assert backend.engine is not first
    assert again.responses == expected.responses
    monkeypatch.setattr(SleepingEngine, "generate", _broken)
    with (
        pytest.warns(UserWarning, match="started anew"),
        pytest.raises(RolloutError, match="(?s)the core is gone.*before it was"),
    ):
        backend.generate(policy.model, PROMPTS, seed=3)


def _broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("the core is gone")


def test_a_prompt_that_is_too_long_is_refused_with_the_limit(policy: Policy, backend: VLLMRollout) -> None:
    with pytest.raises(RolloutError, match="512"):
        backend.generate(policy.model, [[1] * 510], seed=0)
