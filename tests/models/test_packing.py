"""Several texts in one row: each as if it were alone, or the model is refused."""

from __future__ import annotations

import pytest
import torch

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy
from lightning_hybrid.models.packing import refuse_unpackable
from tests.models.test_policy import family

PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "gpt2", "gpt_neox")
LENGTHS = (7, 9, 1, 5)


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (length,), generator=generator) for length in LENGTHS]


def packed_row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and positions of all texts in one row, with padding behind them."""
    tokens = torch.cat([*texts(), torch.zeros(4).long()])[None]
    positions = torch.cat([*(torch.arange(length) for length in LENGTHS), torch.zeros(4).long()])[None]
    return tokens, torch.arange(tokens.shape[1])[None] < sum(LENGTHS), positions


def packed_logprobs(policy: Policy) -> torch.Tensor:
    tokens, mask, positions = packed_row()
    return policy(tokens, mask, positions > 0, position_ids=positions).logprobs[0]


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "eager") for name in PACKABLE), *((name, "sdpa") for name in PACKABLE if name != "gemma2")],
)
def test_a_packed_text_has_the_logprobs_it_has_alone(name: str, attention: str) -> None:
    model = family(name)
    model.set_attn_implementation(attention)
    policy = Policy(model)
    refuse_unpackable(policy)
    together, begin = packed_logprobs(policy), 0
    for text in texts():
        asked = torch.arange(len(text))[None] > 0
        alone = policy(text[None], torch.ones_like(asked), asked).logprobs[0]
        torch.testing.assert_close(together[begin : begin + len(text)], alone, atol=2e-6, rtol=0)
        begin += len(text)
    assert (together[begin:] == 0).all()


def test_a_text_has_no_influence_on_the_others_of_its_row() -> None:
    policy = Policy(family("llama"))
    tokens, mask, positions = packed_row()
    before = policy(tokens, mask, positions > 0, position_ids=positions).logprobs[0]
    tokens[0, :7] = 4
    after = policy(tokens, mask, positions > 0, position_ids=positions).logprobs[0]
    assert not torch.equal(before[1:7], after[1:7])
    assert torch.equal(before[7:], after[7:])


def test_what_flash_attention_is_given_holds_the_same_texts_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU; the row that they are given is run by SDPA here."""
    policy = Policy(family("llama"))
    tokens, mask, positions = (torch.cat([x, x.flip(0)]) for x in packed_row())
    expected = policy(tokens, mask, positions > 0, position_ids=positions).logprobs
    seen = []
    monkeypatch.setattr("lightning_hybrid.models.policy.reads_positions_of_one_row", lambda config: True)
    hook = policy.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    flat = policy(tokens, mask, positions > 0, position_ids=positions).logprobs
    hook.remove()
    assert seen == [(1, 2 * tokens.shape[1])]
    torch.testing.assert_close(flat, expected, atol=2e-6, rtol=0)


def test_a_model_whose_positions_tell_no_texts_apart_is_refused() -> None:
    with pytest.raises(ConfigError, match="a bloom model takes no position_ids.*set packing=false"):
        refuse_unpackable(Policy(family("bloom")))


def test_a_model_that_takes_positions_but_lets_texts_see_each_other_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"see each other in a opt model: its hidden states change by \d+"):
        refuse_unpackable(Policy(family("opt")))


def test_the_refusal_leaves_the_model_in_the_mode_it_was_in() -> None:
    policy = Policy(family("gpt2")).train()
    policy.model.transformer.eval()
    before = [module.training for module in policy.modules()]
    refuse_unpackable(policy)
    assert [module.training for module in policy.modules()] == before
    assert {True, False} == {*before}
