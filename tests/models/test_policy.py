"""A policy's log-probs are those of the model's full logits, whatever the padding and the chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy, ScalarModel, last_value, load_policy, load_scalar, scalar_from_policy
from tests.helpers import tiny_policy

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "bloom": {},
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes = {
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **common, **sizes, **FAMILIES[name])).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three rows: padded on the left, padded on the right, full; the scored tokens are ragged too."""
    tokens = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9).bool()
    mask[0, :3] = False
    mask[1, 6:] = False
    positions = mask.clone()
    positions[:, :4] = False
    return tokens.masked_fill(~mask, 0), mask, positions


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_equal_those_of_full_logits_without_padding(name: str) -> None:
    model = family(name)
    tokens, mask, positions = batch()
    output = Policy(model, chunk=4)(tokens, mask, positions)
    for row in range(3):
        kept = mask[row]
        logits = model(input_ids=tokens[row][kept][None]).logits[0].float()
        logp = logits.log_softmax(-1)
        expected = logp[:-1].gather(1, tokens[row][kept][1:, None]).squeeze(1)
        entropy = -(logp.exp() * logp).sum(-1)[:-1]
        scored = positions[row][kept][1:]
        torch.testing.assert_close(output.logprobs[row][positions[row]], expected[scored], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.entropy[row][positions[row]], entropy[scored], rtol=1e-4, atol=1e-5)
    assert (output.logprobs[~positions] == 0).all()
    assert (output.entropy[~positions] == 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_chunk_changes_neither_values_nor_gradients(chunk: int) -> None:
    tokens, mask, positions = batch()
    tokens = tokens % 40
    gradients, values = [], []
    for size in (10_000, chunk):
        policy = tiny_policy()
        policy.chunk = size
        output = policy(tokens, mask, positions)
        (output.logprobs.sum() + 0.1 * output.entropy.sum()).backward()
        values.append(output.logprobs.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_full_logits_never_exist_at_once() -> None:
    """No tensor that the backward pass keeps is as large as tokens × vocabulary."""
    policy = tiny_policy(vocab_size=5000)
    policy.chunk = 8
    tokens = torch.randint(3, 40, (8, 32))
    mask = torch.ones_like(tokens).bool()
    positions = mask.clone()
    positions[:, 0] = False
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(tokens, mask, positions)
    assert max(saved) < 8 * 31 * 5000 / 4


def test_temperature_divides_the_logits() -> None:
    policy = tiny_policy().eval()
    tokens, mask, positions = batch()
    tokens = tokens % 40
    full = policy.model(input_ids=tokens[2:]).logits.float() / 0.5
    expected = full.log_softmax(-1)[0, 3:-1].gather(1, tokens[2, 4:, None]).squeeze(1)
    got = policy(tokens[2:], mask[2:], positions[2:], temperature=0.5).logprobs[0, 4:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_last_value_reads_the_last_real_token_on_either_padding() -> None:
    values = torch.arange(8.0).reshape(2, 4)
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    assert last_value(values, mask).tolist() == [1.0, 7.0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "qwen2"])
def test_a_critic_from_a_causal_lm_begins_at_zero_and_round_trips(name: str, tmp_path: Any) -> None:
    family(name).save_pretrained(tmp_path / "lm")
    critic = load_scalar(tmp_path / "lm")
    tokens, mask, _ = batch()
    assert (critic(tokens, mask) == 0).all()
    torch.nn.init.normal_(critic.model.score.weight)
    critic.model.save_pretrained(tmp_path / "critic")
    again = load_scalar(tmp_path / "critic")
    torch.testing.assert_close(again.eval()(tokens, mask), critic.eval()(tokens, mask))


def test_a_value_does_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    policy = tiny_policy()
    from lightning_hybrid.modules.roles import scalar_from_policy

    critic = scalar_from_policy(policy)
    torch.nn.init.normal_(critic.model.score.weight)
    tokens, mask, _ = batch()
    values = critic.eval()(tokens % 40, mask)
    for row in range(3):
        alone = critic(tokens[row][mask[row]][None] % 40, torch.ones(1, int(mask[row].sum())).bool())
        torch.testing.assert_close(values[row][mask[row]], alone[0], rtol=1e-4, atol=1e-5)


def test_an_encoder_is_refused_as_a_critic() -> None:
    from transformers import AutoModelForSequenceClassification

    bert = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    with pytest.raises(TypeError, match="has no per-token linear head named 'score'; use a decoder family"):
        ScalarModel(AutoModelForSequenceClassification.from_config(bert))


def test_a_path_that_does_not_exist_is_named(tmp_path: Any) -> None:
    with pytest.raises(
        ValueError, match=r"model path '.*/nowhere' does not exist .* run the recipe that writes it first"
    ):
        load_policy(tmp_path / "nowhere")


def test_a_reward_model_s_folder_is_no_policy(tmp_path: Any) -> None:
    scalar_from_policy(tiny_policy(tie_word_embeddings=False)).model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds no language model: it has no 'lm_head.weight'.*give the folder of a"):
        load_policy(tmp_path)


def test_a_hub_name_without_network_says_what_to_check() -> None:
    with pytest.raises(ValueError, match="'acme/none' is neither a folder here nor to be had from the hub"):
        load_policy("acme/none")


def test_a_folder_without_a_model_lists_what_it_holds(tmp_path: Any) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"cannot be loaded .* it holds: notes\.txt"):
        load_policy(tmp_path)
