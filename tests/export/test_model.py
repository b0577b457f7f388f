"""An exported folder is Hugging Face's own: same names, same logits, whatever was trained and however sharded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.engines import build_engine, engine_config
from lightning_hybrid.engines.build import cast_parameters
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.export import export_model, refuse_config, refuse_form
from lightning_hybrid.models import Policy, ScalarModel, load_policy, load_scalar, scalar_from_policy, with_adapter
from tests.conftest import RunRanks
from tests.engines.hybrids import hybrid, step, whole
from tests.helpers import SHARD_EVERYTHING, tiny_policy
from tests.models.test_policy import FAMILIES, batch, family

TOKENS = torch.randint(3, 45, (4, 12), generator=torch.Generator().manual_seed(0))
KINDS = ("lora", "rslora", "dora")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def with_trained_adapter(policy: Policy, kind: str = "lora", **settings: Any) -> Policy:
    """Adapters that are not zero."""
    torch.manual_seed(1)
    adapted = with_adapter(policy, AdapterConfig(kind=kind, r=4, alpha=16, **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def on_disk(folder: Path, name: str = "llama") -> Path:
    """A base that adapters can name."""
    family(name).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


# ---- full fine-tuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_has_the_names_and_bits_of_save_pretrained_and_loads_with_the_same_logits(
    name: str, tmp_path: Path
) -> None:
    model = family(name)
    model.save_pretrained(tmp_path / "theirs")
    export_model(Policy(model), tmp_path / "ours", build_tokenizer())
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert (loaded(TOKENS).logits - model(TOKENS).logits).abs().max() == 0
    assert (
        loaded.config.to_diff_dict() == AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").config.to_diff_dict()
    )


def test_tokenizer_template_and_generation_config_are_beside_the_weights(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    policy = tiny_policy()
    policy.model.generation_config.temperature = 0.7
    policy.model.generation_config.do_sample = True
    export_model(policy, tmp_path / "model", tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.apply_chat_template([{"role": "user", "content": "the sea"}], tokenize=False) == "the sea"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.temperature == 0.7


def test_what_ends_a_response_is_in_a_generation_config_that_is_else_as_it_was_published(tmp_path: Path) -> None:
    base = on_disk(tmp_path / "base")
    published = {"temperature": 0.6, "eos_token_id": 7}  # Transformers saves no such config of one's own
    (base / "generation_config.json").write_text(json.dumps(published))
    tokenizer = build_tokenizer()
    policy = load_policy(base)
    refuse_config(policy.model, tokenizer)
    export_model(policy, tmp_path / "model", tokenizer)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert sorted(written["eos_token_id"]) == sorted([7, tokenizer.eos_token_id])


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_model_is_split_as_hugging_face_splits_it(tmp_path: Path, tied: bool) -> None:
    policy = tiny_policy(tie_word_embeddings=tied)
    export_model(policy, tmp_path / "model", build_tokenizer(), shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (loaded(TOKENS).logits - policy.eval().model(TOKENS).logits).abs().max() == 0


def test_a_bf16_model_is_written_in_bf16(tmp_path: Path) -> None:
    policy = tiny_policy()
    cast_parameters(policy, torch.bfloat16)
    export_model(policy, tmp_path / "model", build_tokenizer())
    assert {tensor.dtype for tensor in stored(tmp_path / "model").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(load_policy(tmp_path / "model").model(TOKENS).logits, policy.float().model(TOKENS).logits)


def test_a_family_that_is_published_with_other_tensors_is_written_as_published(tmp_path: Path) -> None:
    """Mixtures of experts: Transformers stacks the experts of a layer into one tensor."""
    from transformers import AutoConfig

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "theirs")
    export_model(Policy(model), tmp_path / "ours", build_tokenizer())
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() != model.state_dict().keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_reward_model_loads_as_a_classifier_that_finds_each_text_s_last_token(tmp_path: Path) -> None:
    model = scalar_from_policy(tiny_policy())
    torch.nn.init.normal_(model.model.score.weight)
    export_model(model, tmp_path / "model", build_tokenizer())
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS).bool()
    mask[0, 7:] = False
    tokens[0, 7:] = build_tokenizer().pad_token_id
    expected = model.eval().score(tokens, mask)
    torch.testing.assert_close(loaded(tokens, attention_mask=mask.long()).logits[:, 0], expected, rtol=0, atol=1e-6)
    assert torch.equal(load_scalar(tmp_path / "model").eval().score(tokens, mask), expected)


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_adapters_are_bit_for_bit_peft_s_own_merge_and_leave_the_training_weights_alone(
    kind: str, name: str, tmp_path: Path
) -> None:
    policy = with_trained_adapter(Policy(family(name)), kind).eval()
    before = whole(policy)
    export_model(policy, tmp_path / "model", build_tokenizer())
    assert all(torch.equal(value, before[key]) for key, value in whole(policy).items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = copy.deepcopy(policy.model).merge_and_unload().eval()
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in loaded.state_dict().items())
    # Added before the product instead of after it: the same up to rounding.
    torch.testing.assert_close(loaded(TOKENS).logits, policy.model(TOKENS).logits, rtol=0, atol=2e-6)


def test_merging_in_bf16_rounds_once(tmp_path: Path) -> None:
    policy = with_trained_adapter(tiny_policy())
    cast_parameters(policy, torch.bfloat16)
    export_model(policy, tmp_path / "model", build_tokenizer())
    layer = policy.model.base_model.model.model.layers[0].self_attn.q_proj
    down, up = (matrix["default"].weight.double() for matrix in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.double() + 4.0 * up @ down
    written = stored(tmp_path / "model")["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(written, exact.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_alone_loads_with_plain_peft_and_with_load_policy(kind: str, tmp_path: Path) -> None:
    base = on_disk(tmp_path / "base")
    policy = with_trained_adapter(load_policy(base), kind).eval()
    export_model(policy, tmp_path / "adapter", build_tokenizer(), form="adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors" not in names
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert (theirs(TOKENS).logits - policy.model(TOKENS).logits).abs().max() == 0
    merged = load_policy(tmp_path / "adapter").eval()
    assert type(merged.model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(merged.model(TOKENS).logits, policy.model(TOKENS).logits, rtol=0, atol=2e-6)


def test_an_adapter_is_one_file_however_large(tmp_path: Path) -> None:
    """peft reads no other."""
    policy = with_trained_adapter(load_policy(on_disk(tmp_path / "base"))).eval()
    export_model(policy, tmp_path / "adapter", build_tokenizer(), form="adapter", shard_bytes=1000)
    assert [path.name for path in (tmp_path / "adapter").glob("*.safetensors*")] == ["adapter_model.safetensors"]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(theirs(TOKENS).logits, policy.model(TOKENS).logits)


def test_a_reward_model_s_adapter_brings_its_head(tmp_path: Path) -> None:
    base = on_disk(tmp_path / "base")
    model = with_adapter(load_scalar(base), AdapterConfig(r=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained)
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    for name, parameter in model.named_parameters():
        if name in trained:
            torch.nn.init.normal_(parameter, std=0.1)
    tokens, mask, _ = batch()
    expected = model.eval()(tokens, mask)
    assert expected.abs().max() > 0.1
    for form in ("merged", "adapter"):
        export_model(model, tmp_path / form, build_tokenizer(), form=form)  # type: ignore[arg-type]
        torch.testing.assert_close(load_scalar(tmp_path / form).eval()(tokens, mask), expected, rtol=0, atol=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.num_labels == 1
    with pytest.raises(ConfigError, match="holds the adapter of a reward model or critic, not of a language model"):
        load_policy(tmp_path / "adapter")


def test_an_adapter_on_a_tied_head_sets_the_head_apart(tmp_path: Path) -> None:
    model = tiny_policy(tie_word_embeddings=True).model
    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=False, task_type="CAUSAL_LM")
    policy = Policy(peft.get_peft_model(model, settings)).eval()
    torch.nn.init.normal_(policy.model.base_model.model.lm_head.lora_B["default"].weight, std=0.3)
    export_model(policy, tmp_path / "model", build_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, policy.model(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
            "model.embed_tokens has Embedding, which is not LoRA on",
        ),
        (peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), "has an adapter with a bias"),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "a learned prompt is no change of weights",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_by_name(settings: Any, reason: str) -> None:
    model = peft.get_peft_model(tiny_policy(tie_word_embeddings=False).model, settings)
    with pytest.raises(ConfigError, match=f"export=merged: .*{reason}.*give export=adapter"):
        refuse_form(model, "merged")


def test_an_adapter_needs_a_base_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no adapter; train one"):
        refuse_form(tiny_policy().model, "adapter")
    with pytest.raises(ConfigError, match="the base has no name that an adapter could be put on"):
        refuse_form(with_trained_adapter(tiny_policy()).model, "adapter")
    base = on_disk(tmp_path / "base")
    export_model(with_trained_adapter(load_policy(base)), tmp_path / "first", build_tokenizer(), form="adapter")
    second = with_trained_adapter(load_policy(tmp_path / "first"))
    with pytest.raises(ConfigError, match="the base '.*first' is itself an adapter"):
        refuse_form(second.model, "adapter")
    refuse_form(second.model, "merged")


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone_in_group")
@pytest.mark.parametrize("kind", ["none", "lora", "dora"])
def test_at_zero_3_one_parameter_at_a_time_is_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy() if kind == "none" else with_trained_adapter(tiny_policy(), kind)
    engine = hybrid(policy, 3)
    step(engine, policy)
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    at_once: list[int] = []
    enter = GatheredParameters.__enter__

    def counting(self: Any) -> None:
        enter(self)
        at_once.append(sum(p.numel() for p in policy.parameters()))  # those that are not whole have no elements

    with monkeypatch.context() as patch:
        patch.setattr(GatheredParameters, "__enter__", counting)
        export_model(policy, tmp_path / "model", build_tokenizer())
    assert max(at_once) == max(p.ds_numel for p in policy.parameters())
    assert sum(p.numel() for p in policy.parameters()) == 0
    expected = copy.deepcopy(tiny_policy() if kind == "none" else with_trained_adapter(tiny_policy(), kind))
    expected.load_state_dict(whole(policy))
    plain = expected.model if kind == "none" else expected.model.merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (loaded.eval()(TOKENS).logits - plain.eval()(TOKENS).logits).abs().max() == 0
    step(engine, policy)  # training goes on


def export_on_ranks(folder: str, kind: str, stage: int) -> None:
    """Run by each rank: steps of training, then an export."""
    import deepspeed

    from lightning_hybrid.engines.environment import prepare_deepspeed

    prepare_deepspeed("cpu")
    torch.distributed.init_process_group("gloo")
    deepspeed.init_distributed("gloo", verbose=False)
    policy = tiny_policy() if kind == "none" else with_trained_adapter(tiny_policy(), kind)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    settings = engine_config(stage=stage, precision="32-true", overrides=SHARD_EVERYTHING if stage == 3 else None)
    engine = build_engine(policy, optimizer, settings)
    step(engine, policy)
    export_model(policy, Path(folder), build_tokenizer(), shard_bytes=30_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "lora"])
def test_two_ranks_at_zero_3_write_what_one_rank_writes(run_ranks: RunRanks, kind: str, tmp_path: Path) -> None:
    run_ranks(export_on_ranks, 1, str(tmp_path / "one"), kind, 3, timeout=240)
    run_ranks(export_on_ranks, 2, str(tmp_path / "two"), kind, 3, timeout=240)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one)


def export_to_a_folder_in_the_way(folder: str) -> None:
    """Run by each rank: an export that the first rank refuses half-way; no rank waits for ever."""
    from lightning_hybrid.errors import CheckpointError

    try:
        export_on_ranks(folder, "none", 3)
    except CheckpointError as error:
        assert "is not empty and no export" in str(error)  # noqa: PT017  # in a process of its own
        print("refused")


@pytest.mark.slow
def test_what_one_rank_cannot_write_every_rank_says(run_ranks: RunRanks, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    outputs = run_ranks(export_to_a_folder_in_the_way, 2, str(tmp_path / "model"), timeout=240)
    assert all("refused" in output for output in outputs)
    assert [path.name for path in tmp_path.glob("model*")] == ["model"]


def test_a_scalar_model_of_a_wrapped_head_is_told_from_an_encoder() -> None:
    with pytest.raises(TypeError, match="has no per-token linear head named 'score'"):
        ScalarModel(tiny_policy().model)
