"""Generation without a Trainer: what is said, that it can be had again, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_hybrid as lh
from lightning_hybrid.containers import Decoder, lay_out
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.generation import memory, pad_left
from lightning_hybrid.models import load_policy
from tests.containers.models import variant
from tests.helpers import tiny_policy

PROMPTS = [list(range(3, 4 + i % 17)) for i in range(30)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_policy().model.eval()


def test_a_response_depends_on_seed_prompt_and_sample_and_on_nothing_else(model: Any) -> None:
    sampling = lh.SamplingParams(12, eos_ids=(5,), n=3)
    everything = lh.generate(model, PROMPTS, sampling, seed=4)
    in_turns = lh.generate(model, PROMPTS, sampling, seed=4, max_tokens_in_flight=4 * 32)
    alone = lh.generate(model, PROMPTS[9:10], sampling, seed=4, indices=[9])
    assert in_turns.responses == everything.responses
    assert in_turns.logprobs == everything.logprobs
    assert alone.responses == everything.responses[27:30]
    assert alone.logprobs == everything.logprobs[27:30]
    assert lh.generate(model, PROMPTS, sampling, seed=5).responses != everything.responses
    assert len({tuple(response) for response in alone.responses}) == 3


def test_torchs_own_random_stream_is_neither_used_nor_moved(model: Any) -> None:
    before = torch.get_rng_state()
    lh.generate(model, PROMPTS, lh.SamplingParams(4))
    assert torch.equal(before, torch.get_rng_state())


def test_samples_of_a_prompt_share_one_reading_of_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_read: list[int] = []
    run = Decoder.__call__

    def counted(self: Decoder, tokens: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        tokens_read.append(len(tokens))
        return run(self, tokens, *rest, **named)

    monkeypatch.setattr(Decoder, "__call__", counted)
    lh.generate(model, [[5, 6, 7, 8], [9, 10]], lh.SamplingParams(3, n=8, eos_ids=()))
    assert tokens_read == [6, 16, 16]


def test_a_row_that_ended_is_never_computed_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: (rows.append(len(hidden)), run(self, hidden))[1])
    rollout = lh.generate(model, PROMPTS, lh.SamplingParams(20, eos_ids=(4, 5, 6)))
    assert sum(rows) == int(rollout.lengths.sum())


def test_gradients_may_flow_through_what_was_rolled_out(model: Any) -> None:
    rollout = lh.generate(model, PROMPTS[:2], lh.SamplingParams(4, entropy=True))
    weight = torch.ones((), requires_grad=True)
    (weight * rollout.policy_logprobs * rollout.sampling_logprobs * rollout.entropies).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training: bool) -> None:
    model = tiny_policy().model.train(training)
    lh.generate(model, PROMPTS[:2], lh.SamplingParams(2))
    assert model.training is training


def test_laying_weights_together_moves_them_and_changes_nothing() -> None:
    model = variant("qwen2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lay_out(model)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    assert attention.q_proj.bias.untyped_storage().data_ptr() == attention.k_proj.bias.untyped_storage().data_ptr()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_in_somebody_elses_memory_stay_there() -> None:
    model = variant("llama")
    weight = model.model.layers[0].self_attn.k_proj.weight
    block = torch.cat([weight.data.flatten(), torch.zeros(8)])
    weight.data = block[: weight.numel()].view_as(weight)
    lay_out(model)
    assert weight.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
    lh.generate(model, PROMPTS[:2], lh.SamplingParams(2))


def test_more_rows_than_memory_has_room_for_wait_their_turn(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = lh.generate(model, PROMPTS, lh.SamplingParams(8))
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 3 * 2 * 2 * 2 * 32 * 8 * 4)  # three rows of 32 tokens
    assert lh.generate(model, PROMPTS, lh.SamplingParams(8)).responses == plenty.responses


def test_memory_without_room_for_a_single_row_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 100)
    with pytest.raises(RolloutError, match=r"KV cache of one row of 32 tokens takes .* MiB of cpu may be used"):
        lh.generate(model, PROMPTS, lh.SamplingParams(8))


def test_a_budget_without_room_for_a_single_row_is_refused(model: Any) -> None:
    with pytest.raises(RolloutError, match="max_tokens_in_flight=20 has no room for one row of 32 tokens"):
        lh.generate(model, PROMPTS, lh.SamplingParams(8), max_tokens_in_flight=20)


def test_a_token_that_the_model_does_not_know_is_named(model: Any) -> None:
    with pytest.raises(RolloutError, match=r"prompt 1 has the token id 999; the model's embedding has rows 0 to \d+"):
        lh.generate(model, [[3], [4, 999]], lh.SamplingParams(2))


def test_there_is_one_index_for_each_prompt(model: Any) -> None:
    with pytest.raises(ValueError, match="shorter"):
        lh.generate(model, [[3], [4]], lh.SamplingParams(2), indices=[0])


def test_end_tokens_may_be_a_list_and_unknown_ones_never_come(model: Any) -> None:
    sampling = lh.SamplingParams(4, eos_ids=[5, 10_000, -1], min_new_tokens=2)  # type: ignore[arg-type]
    assert lh.generate(model, [[3]], sampling).lengths.item() >= 2


def test_autocast_around_it_changes_nothing(model: Any) -> None:
    plain = lh.generate(model, PROMPTS[:3], lh.SamplingParams(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert lh.generate(model, PROMPTS[:3], lh.SamplingParams(4)).logprobs == plain.logprobs


def test_a_long_prompt_does_not_widen_all_the_others_in_its_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_hybrid.generation import loop

    read: list[tuple[int, int]] = []
    make = loop.Prefill.__init__

    def noted(self: Any, cache: Any, scores: Any, slots: Any, lengths: list[int]) -> None:
        read.append((len(lengths), max(lengths)))
        make(self, cache, scores, slots, lengths)

    monkeypatch.setattr(loop.Prefill, "__init__", noted)
    monkeypatch.setattr(loop, "PREFILL_TOKENS", 256)
    prompts = [[3] * 40, *([[4]] * 30)]
    plain = lh.generate(model, prompts, lh.SamplingParams(4, temperature=0))
    assert all(rows * -(-longest // 32) * 32 <= 256 for rows, longest in read)
    assert len(plain.responses) == 31


def test_all_that_is_wrong_with_sampling_parameters_comes_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        lh.SamplingParams(0, temperature=-1.0, top_k=-1, top_p=0.0, min_p=2.0, n=0, repetition_penalty=0, stop=("",))
    for part in (
        "max_new_tokens is 0: must be at least 1",
        "temperature is -1.0: must be 0 (most probable token) or above",
        "top_k is -1",
        "top_p is 0.0: must be above 0 and at most 1",
        "min_p is 2.0",
        "n is 0: must be at least 1",
        "stop is ('',)",
        "repetition_penalty is 0",
    ):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"min_new_tokens is 5: must be between 0 and max_new_tokens \(4\)"):
        lh.SamplingParams(4, min_new_tokens=5)
    with pytest.raises(ConfigError, match="top_p is nan"):
        lh.SamplingParams(4, top_p=float("nan"))


def test_the_real_model_greedily_says_what_it_says_by_itself_to_256_prompts(shared: Path) -> None:
    model = load_policy(shared / "models" / "tinystories-656k").model.eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, *torch.randint(3, 2048, (1 + i % 40,), generator=generator).tolist()] for i in range(256)]
    rollout = lh.generate(model, prompts, lh.SamplingParams(64, temperature=0))
    tokens, mask = pad_left(prompts, 0, torch.device("cpu"))
    said = model.generate(tokens, attention_mask=mask.long(), do_sample=False, max_new_tokens=64, pad_token_id=0)
    for response, row in zip(rollout.responses, said[:, tokens.shape[1] :].tolist(), strict=True):
        assert response == row[: len(response)]
        assert set(row[len(response) :]) <= {0}
