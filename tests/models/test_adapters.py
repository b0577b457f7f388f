"""Adapters on policies and scalar models: what is trained, how they merge, and which base they belong to."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import (
    AdaptersOff,
    Policy,
    has_adapter,
    load_policy,
    load_scalar,
    load_tokenizer,
    scalar_from_policy,
    with_adapter,
)
from lightning_hybrid.models.adapters import base_fingerprint, is_fingerprint_of
from lightning_hybrid.models.merging import merged_weight
from tests.helpers import tiny_policy
from tests.models.test_policy import batch, family

KINDS = ("lora", "rslora", "dora")


def adapted(policy: Policy, kind: str = "lora", **settings: Any) -> Policy:
    """With adapters that are not zero."""
    torch.manual_seed(1)
    policy = with_adapter(policy, AdapterConfig(kind=kind, r=4, **settings))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def base_folder(folder: Path, **changes: Any) -> Path:
    tiny_policy(**changes).model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(kind: str) -> None:
    policy = tiny_policy().eval()
    before = policy(*batch()).logprobs
    policy = with_adapter(policy, AdapterConfig(kind=kind, r=4)).eval()
    assert has_adapter(policy)
    torch.testing.assert_close(policy(*batch()).logprobs, before, rtol=0, atol=0 if kind != "dora" else 1e-6)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    layers = {name.partition(".lora_")[0].rsplit(".", 1)[-1] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_settings_are_those_of_peft() -> None:
    config = AdapterConfig(kind="rslora", r=9, alpha=6, dropout=0.1, target_modules=["q_proj"])
    policy = with_adapter(tiny_policy(), config)
    layer = policy.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 6 / 9**0.5
    assert layer.lora_A["default"].weight.shape == (9, 32)
    assert layer.lora_dropout["default"].p == 0.1
    assert not hasattr(policy.model.base_model.model.model.layers[0].self_attn.k_proj, "lora_A")


def test_layers_that_the_model_has_not_are_named_with_those_that_it_has() -> None:
    config = AdapterConfig(target_modules=["q_proj", "query"])
    with pytest.raises(ConfigError, match=r"'query' is no linear layer of this model; it has: down_proj, gate_proj"):
        with_adapter(tiny_policy(), config)
    with pytest.raises(ConfigError, match="'embed_tokens' is no linear layer"):
        with_adapter(tiny_policy(), AdapterConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="target_modules = .*: name at least one kind of layer"):
        AdapterConfig(target_modules=[])


def test_gpt2_s_transposed_layers_get_adapters_too() -> None:
    policy = adapted(Policy(family("gpt2")))
    assert any("c_attn.lora_A" in name for name, _ in policy.named_parameters())


def test_merging_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    down, up = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    # B A = [[2, -2], [0.5, -0.5]]; halved and added: [[2, 1], [3.25, 3.75]]
    total = torch.tensor([[2.0, 1.0], [3.25, 3.75]], dtype=torch.float64)
    assert torch.equal(merged_weight([weight, down, up], 0.5), total)
    assert torch.equal(merged_weight([weight.T, down, up], 0.5, transposed=True), total.T)
    lengths = torch.tensor([3.0, 1.0], dtype=torch.float64)
    rows = total * torch.tensor([[3.0 / 5.0**0.5], [1.0 / (3.25**2 + 3.75**2) ** 0.5]], dtype=torch.float64)
    torch.testing.assert_close(merged_weight([weight, down, up, lengths], 0.5), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_from_a_policy_with_adapters_has_them_in_its_trunk(kind: str) -> None:
    policy = adapted(tiny_policy(), kind).eval()
    tokens, mask, _ = batch()
    critic = scalar_from_policy(policy).eval()
    hidden = policy.model.get_base_model().base_model(input_ids=tokens[2:]).last_hidden_state
    torch.nn.init.ones_(critic.model.score.weight)
    torch.testing.assert_close(critic(tokens, mask)[2:], hidden.sum(-1), rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in critic.named_parameters())
    assert scalar_from_policy(policy).model.score.weight.abs().max() == 0


def test_a_critic_with_an_adapter_trains_it_and_the_head() -> None:
    critic = with_adapter(scalar_from_policy(tiny_policy()), AdapterConfig(r=4))
    tokens, mask, _ = batch()
    assert critic(tokens, mask).abs().max() == 0
    (critic(tokens, mask) - 1).square().mean().backward()
    moved = {name for name, p in critic.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {
        "model.base_model.model.score.modules_to_save.default.weight"
    }  # a head of zeros passes no gradient
    assert copy.deepcopy(critic)(tokens, mask).shape == tokens.shape


# ---- the base alone --------------------------------------------------------------------------------------------------


def test_dropout_is_off_in_the_base_and_on_again_in_the_policy() -> None:
    policy = adapted(tiny_policy(attention_dropout=0.5), dropout=0.5).train()
    reference = AdaptersOff(policy)
    expected = tiny_policy().eval()(*batch()).logprobs
    assert torch.equal(reference(*batch()).logprobs, expected)
    assert not torch.equal(policy(*batch()).logprobs, policy(*batch()).logprobs)


def test_what_has_no_adapters_or_a_base_that_they_changed_is_no_reference() -> None:
    with pytest.raises(ConfigError, match="no LoRA adapters to switch off: put one on with adapter=lora"):
        AdaptersOff(tiny_policy())
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="begun with init_lora_weights='pissa' take a part of the base weights"):
        AdaptersOff(Policy(peft.get_peft_model(tiny_policy().model, settings)))


# ---- folders that hold an adapter ------------------------------------------------------------------------------------


def saved_adapter(tmp_path: Path, kind: str = "lora", **settings: Any) -> tuple[Path, Policy]:
    """A plain peft folder, as any tool writes it, and what it holds."""
    policy = adapted(load_policy(base_folder(tmp_path / "base")), kind, **settings).eval()
    policy.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", policy


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_loads_as_the_plain_model_with_the_adapter_in_its_weights(kind: str, tmp_path: Path) -> None:
    folder, policy = saved_adapter(tmp_path, kind)
    loaded = load_policy(folder).eval()
    assert not has_adapter(loaded)
    torch.testing.assert_close(loaded(*batch()).logprobs, policy(*batch()).logprobs, rtol=0, atol=5e-6)
    assert load_tokenizer(folder).get_vocab() == build_tokenizer().get_vocab()
    scalar = load_scalar(folder)
    assert torch.equal(scalar.model.model.layers[0].mlp.up_proj.weight, loaded.model.model.layers[0].mlp.up_proj.weight)


def test_the_adapter_of_a_loaded_adapter_begins_at_what_was_loaded(tmp_path: Path) -> None:
    folder, _ = saved_adapter(tmp_path)
    loaded = load_policy(folder).eval()
    expected = loaded(*batch()).logprobs
    assert torch.equal(AdaptersOff(adapted(loaded))(*batch()).logprobs, expected)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"hidden_size": 64}, r"has shape \(4, 32\), on this base \(4, 64\)"),
        (
            {"num_hidden_layers": 3},
            r"'base_model.model.model.layers.2.mlp.down_proj.lora_A.weight' is not in the adapter",
        ),
        ({"num_hidden_layers": 1}, r"'base_model.model.model.layers.1.mlp.down_proj.lora_A.weight' has no place"),
    ],
)
def test_a_base_of_other_shapes_is_refused(other: dict[str, int], problem: str, tmp_path: Path) -> None:
    folder, _ = saved_adapter(tmp_path, target_modules=["q_proj", "down_proj"])
    base = base_folder(tmp_path / "other", **other)
    with pytest.raises(ConfigError, match=f"does not fit '.*other': .*{problem}.*give model.base"):
        load_policy(folder, base=str(base))


def test_a_base_of_other_weights_is_told_by_the_fingerprint(tmp_path: Path) -> None:
    folder, policy = saved_adapter(tmp_path)
    record = {"base": {"fingerprint": policy.model.base_fingerprint, "relative": "../moved"}}
    (folder / "export.json").write_text(json.dumps(record))
    assert has_adapter(policy)
    load_policy(folder)
    other = base_folder(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="was not trained on the weights of '.*other': their fingerprints differ"):
        load_policy(folder, base=str(other))
    (tmp_path / "base").rename(tmp_path / "moved")
    load_policy(folder)  # found where it lies beside the adapter
    (tmp_path / "moved").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="does not exist"):
        load_policy(folder)


def test_fingerprints_see_one_element_of_every_small_parameter_and_no_precision() -> None:
    policy = tiny_policy()
    before = base_fingerprint(policy.model)
    assert base_fingerprint(tiny_policy().model) == before
    with torch.no_grad():
        policy.model.model.norm.weight[7] += 1e-3
    assert base_fingerprint(policy.model) != before


def in_four_bits(model: Any) -> Any:
    """A model whose linear layers hold their weights as bitsandbytes does: two to a byte, the head left as it is."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and not (name.endswith("lm_head") or ".lora_" in name):
            held = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
            module.weight = torch.nn.Parameter(held, requires_grad=False)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_that_was_quantized_is_told_by_what_was_not(name: str) -> None:
    whole = family(name)
    fingerprint = base_fingerprint(in_four_bits(copy.deepcopy(whole)))
    assert fingerprint.startswith("beside-linear-layers:")
    assert fingerprint != base_fingerprint(whole)
    assert is_fingerprint_of(fingerprint, whole)
    assert is_fingerprint_of(base_fingerprint(whole), whole)
    with torch.no_grad():
        next(parameter for key, parameter in whole.named_parameters() if "norm" in key or "ln" in key)[3] += 1e-3
    assert not is_fingerprint_of(fingerprint, whole)


def test_an_adapter_of_a_quantized_base_is_not_merged_into_another(tmp_path: Path) -> None:
    folder, _ = saved_adapter(tmp_path)
    fingerprint = base_fingerprint(in_four_bits(load_policy(tmp_path / "base").model))
    (folder / "export.json").write_text(json.dumps({"base": {"fingerprint": fingerprint}}))
    load_policy(folder)
    with pytest.raises(ConfigError, match="was not trained on the weights of '.*other'"):
        load_policy(folder, base=str(base_folder(tmp_path / "other", seed=1)))


def test_an_adapter_that_does_not_say_its_base_s_weights_is_remarked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = saved_adapter(tmp_path)
    load_policy(folder)
    assert f"adapter '{folder}' does not say which weights it was trained on" in caplog.text


@pytest.mark.parametrize("text", ["[]", '{"base": "a"}'])
def test_a_record_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    folder, _ = saved_adapter(tmp_path)
    (folder / "export.json").write_text(text)
    with pytest.raises(ConfigError, match=r"export.json' is no record of an export"):
        load_policy(folder)


def test_a_critic_of_a_quantized_policy_has_to_be_given() -> None:
    policy = adapted(tiny_policy())
    in_four_bits(policy.model)
    remedy = "is quantized, and what it was rounded from is not here; give model.critic, such as the path of the model"
    with pytest.raises(ConfigError, match=remedy):
        scalar_from_policy(policy)


def test_four_bits_without_bitsandbytes_say_what_to_install(tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    base = base_folder(tmp_path / "base")
    with pytest.raises(ConfigError, match=r'needs bitsandbytes.*pip install "lightning-hybrid\[qlora\]"'):
        load_policy(base, quantize="nf4")


def test_an_adapter_has_no_place_in_four_bits(tmp_path: Path) -> None:
    folder, _ = saved_adapter(tmp_path)
    with pytest.raises(ConfigError, match="merge it first: lightning-hybrid export model.path="):
        load_policy(folder, quantize="nf4")


def test_a_broken_adapter_folder_is_refused(tmp_path: Path) -> None:
    folder, _ = saved_adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be put on"):
        load_policy(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config.json' cannot be read"):
        load_policy(folder)
