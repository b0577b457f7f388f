"""What every rollout backend owes: what was sampled, how probable it was, and why it ended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid import RolloutConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.models import Policy, load_policy, load_tokenizer
from lightning_hybrid.modules.passes import policy_logprobs
from lightning_hybrid.modules.text import decode_responses
from lightning_hybrid.rollout import Rollout, RolloutBackend, make_backend
from tests.helpers import tiny_policy

EOS = 2
PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 20, 21, 22, 23, 24]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy().eval()


@pytest.fixture(params=["native", "hf"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def backend(name: str, eos: int | None = EOS, pad: int = 0, tokenizer: Any = None, **config: Any) -> RolloutBackend:
    settings = RolloutConfig(**({"max_new_tokens": 12, "backend": name} | config))
    return make_backend(settings, [] if eos is None else [eos], pad, tokenizer)


def roll(name: str, policy: Policy, seed: int = 0, greedy: bool = False, **settings: Any) -> Rollout:
    return backend(name, **settings).generate(policy.model, PROMPTS, seed, greedy)


def test_logprobs_are_those_of_the_training_forward(name: str, policy: Policy) -> None:
    rollout = roll(name, policy)
    expected = policy_logprobs(policy, rollout, micro_batch_size=2)
    torch.testing.assert_close(rollout.policy_logprobs, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rollout.sampling_logprobs, rollout.policy_logprobs)  # temperature 1, nothing cut off


def test_sampling_logprobs_are_under_the_shaped_distribution(name: str, policy: Policy) -> None:
    rollout = roll(name, policy, temperature=0.7, top_k=10, top_p=0.8)
    row, prompt = 1, PROMPTS[1]
    tokens = prompt + rollout.responses[row]
    logits = policy.model(torch.tensor([tokens])).logits[0].float() / 0.7
    for step in range(len(rollout.responses[row])):
        at = logits[len(prompt) - 1 + step].clone()
        at[at < at.topk(10).values[-1]] = -torch.inf
        ordered, index = at.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        at[index[mass_before >= 0.8]] = -torch.inf
        expected = at.log_softmax(-1)[tokens[len(prompt) + step]]
        column = rollout.tokens.shape[1] - rollout.response_mask.shape[1] + 6 + step
        torch.testing.assert_close(rollout.sampling_logprobs[row, column], expected, rtol=1e-4, atol=1e-5)


def test_greedy_responses_do_not_depend_on_the_padding_of_their_neighbours(name: str, policy: Policy) -> None:
    rollout = roll(name, policy, greedy=True)
    for prompt, response in zip(PROMPTS, rollout.responses, strict=True):
        alone = policy.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0
        )
        assert response == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pad", [0, EOS], ids=["pad is unk", "pad is eos"])
def test_a_response_ends_with_its_first_eos_whatever_pads(name: str, policy: Policy, pad: int) -> None:
    eos = roll(name, policy, greedy=True).responses[0][3]  # what greedy decoding says fourth, made the end of text
    rollout = roll(name, policy, greedy=True, eos=eos, pad=eos if pad == EOS else pad)
    assert rollout.finish_reasons[0] == "eos"
    assert rollout.responses[0][-1] == eos
    assert eos not in rollout.responses[0][:-1]
    for response, reason in zip(rollout.responses, rollout.finish_reasons, strict=True):
        assert reason == ("eos" if response[-1] == eos else "length")
    assert (rollout.policy_logprobs[~rollout.response_mask] == 0).all()


def test_no_response_ends_before_min_new_tokens(name: str, policy: Policy) -> None:
    likely_end = roll(name, policy, greedy=True).responses[0][0]
    assert min(roll(name, policy, seed=s, eos=likely_end, min_new_tokens=6).lengths.min() for s in range(5)) >= 6


def test_a_stop_text_ends_a_response_with_the_token_that_completes_it(name: str, policy: Policy) -> None:
    tokenizer = build_tokenizer()
    plain = roll(name, policy, greedy=True, eos=None)
    text = tokenizer.decode(plain.responses[0][2:4])  # what is said third and fourth, across two tokens
    stopped = roll(name, policy, greedy=True, eos=None, stop=[text], tokenizer=tokenizer)
    assert stopped.responses[0] == plain.responses[0][:4]
    assert stopped.finish_reasons[0] == "stop"
    assert stopped.finished[0]
    late = roll(name, policy, greedy=True, eos=None, stop=[text], tokenizer=tokenizer, min_new_tokens=6)
    assert late.lengths[0] >= 6


def test_a_stop_text_without_a_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"stop=\['end'\] needs a tokenizer"):
        backend(name, stop=["end"])


def test_a_repetition_penalty_weighs_on_what_the_row_holds_and_on_no_padding(name: str, policy: Policy) -> None:
    rollout = roll(name, policy, greedy=True, eos=None, repetition_penalty=1.5)
    for prompt, response in zip(PROMPTS, rollout.responses, strict=True):
        alone = policy.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, repetition_penalty=1.5, eos_token_id=None
        )
        assert response == alone[0, len(prompt) :].tolist()


def test_min_p_leaves_no_token_much_less_probable_than_the_best(name: str, policy: Policy) -> None:
    rollout = backend(name, eos=None, max_new_tokens=1, min_p=0.7).generate(policy.model, [[1, 5, 6]] * 500, seed=0)
    probabilities = policy.model(torch.tensor([[1, 5, 6]])).logits[0, -1].detach().softmax(-1)
    drawn = {response[0] for response in rollout.responses}
    assert drawn == set((probabilities >= 0.7 * probabilities.max()).nonzero().flatten().tolist())


def test_a_seed_fixes_the_responses_and_leaves_the_callers_random_stream_alone(name: str, policy: Policy) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = roll(name, policy, seed=1), roll(name, policy, seed=1), roll(name, policy, seed=2)
    assert first.responses == again.responses != other.responses
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_frequencies_are_the_models_probabilities(name: str, policy: Policy) -> None:
    """Chi-square over the ten most probable first tokens and the rest; 27.9 is its 0.1% point for 10 degrees."""
    rollout = backend(name, eos=None, max_new_tokens=1).generate(policy.model, [[1, 5, 6]] * 4000, seed=0)
    drawn = Counter(response[0] for response in rollout.responses)
    probabilities = policy.model(torch.tensor([[1, 5, 6]])).logits[0, -1].detach().float().softmax(-1)
    top = probabilities.topk(10)
    expected = [4000 * p for p in top.values.tolist()] + [4000 * (1 - float(top.values.sum()))]
    seen = [drawn[t] for t in top.indices.tolist()]
    seen.append(4000 - sum(seen))
    assert sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True)) < 27.9


def test_a_prompt_without_tokens_is_refused(name: str, policy: Policy) -> None:
    with pytest.raises(RolloutError, match="prompt 1 is empty: give it at least one token"):
        backend(name, max_new_tokens=4).generate(policy.model, [[1], []], seed=0)


def test_a_prompt_that_leaves_no_room_for_a_response_is_refused(name: str, policy: Policy) -> None:
    with pytest.raises(RolloutError, match=r"prompt 0 has 60 tokens; with max_new_tokens=8 .* model's 64 positions"):
        backend(name, max_new_tokens=8).generate(policy.model, [[1] * 60], seed=0)


def test_a_real_model_tells_stories_that_end_and_join_with_their_prompts(name: str, shared: Path) -> None:
    folder = shared / "models" / "tinystories-656k"
    policy, tokenizer = load_policy(folder).eval(), load_tokenizer(folder)
    texts = ["Once upon a time, there was a", "Tom and Lily like to play"] * 8
    ids = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    storyteller = backend(name, tokenizer.eos_token_id, tokenizer.pad_token_id, max_new_tokens=300)
    rollout = storyteller.generate(policy.model, ids, seed=0)
    assert "eos" in rollout.finish_reasons
    assert len(set(rollout.lengths.tolist())) > 4  # stories differ in length
    for prompt, response, both in zip(
        ids, decode_responses(tokenizer, rollout), map(list.__add__, ids, rollout.responses), strict=True
    ):
        assert tokenizer.decode(prompt, skip_special_tokens=True) + response == tokenizer.decode(
            both, skip_special_tokens=True
        )


def test_deepspeeds_kernels_say_why_they_do_not_run_this_model(policy: Policy) -> None:
    with pytest.raises(RolloutError, match=r"LlamaForCausalLM: .*; set rollout\.backend=native"):
        roll("deepspeed", policy)
