"""DeepSpeed's kernels are refused with a reason, and each reason is what DeepSpeed's own code does."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference
from deepspeed.ops.transformer.inference.ds_attention import DeepSpeedSelfAttention
from deepspeed.ops.transformer.inference.ds_mlp import DeepSpeedMLP
from deepspeed.ops.transformer.inference.op_binding.base import BaseOp
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_hybrid import RolloutConfig
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.rollout import make_backend
from lightning_hybrid.rollout.deepspeed import reason_against
from tests.models.test_policy import FAMILIES, family

CUDA = torch.device("cuda")  # a name: nothing here touches a device
REASONS = {
    "llama": "2 key/value heads for 4 query heads",
    "mistral": "no policy for the layer MistralDecoderLayer",
    "qwen2": "no policy for the layer Qwen2DecoderLayer",
    "qwen3": "no policy for the layer Qwen3DecoderLayer",
    "gemma2": "no policy for the layer Gemma2DecoderLayer",
    "granite": "no policy for the layer GraniteDecoderLayer",
    "gpt2": "no set_params_wo_copy",
    "gpt_neox": "attention.hidden_size",
    "opt": "leaves OPT out itself",
    "bloom": "refuses every transformers after 4.43",
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "llama, plain": ({}, "leaves transformers' cache empty.*returns a tuple"),
    "llama, wide heads": ({"head_dim": 16}, "rotates hidden_size / heads = 8 .* heads have 16"),
    "llama, scaled RoPE": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type is 'linear'",
    ),
    "llama, attention bias": ({"attention_bias": True}, "drops the biases"),
    "llama, MLP bias": ({"mlp_bias": True}, "drops the biases"),
    "llama, gelu": ({"hidden_act": "gelu"}, "computes silu .* 'gelu'"),
    "gptj": ({"rotary_dim": 4}, "cache empty[^;]*$"),
    "gpt_neo": (
        {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
        "cache empty[^;]*$",
    ),
}


def other(name: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    ends = {"intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name.split(",")[0], **sizes, **ends, **OTHERS[name][0])
    return AutoModelForCausalLM.from_config(config).eval()


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def refuse(engine: Any, match: str) -> None:
    backend = make_backend(RolloutConfig(backend="deepspeed"), [2], 0)
    with pytest.raises(RolloutError, match=match):
        backend.generate(engine, [[1, 5]], 0)


def test_every_family_has_its_reason() -> None:
    assert REASONS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", REASONS)
def test_the_error_names_the_model_the_reason_and_the_remedy(name: str) -> None:
    model = family(name)
    refuse(model, f"with {type(model).__name__}: .*{REASONS[name]}.*; set rollout.backend=native")


@pytest.mark.parametrize("name", OTHERS)
def test_llamas_and_old_gpts_have_their_reason_on_cuda_too(name: str) -> None:
    assert re.search(OTHERS[name][1], reason_against(other(name), CUDA))


def test_a_plain_model_off_cuda_is_refused_for_its_device() -> None:
    refuse(other("llama, plain"), "CUDA alone, and the model is on cpu")


def test_adapters_are_not_seen_and_the_model_inside_is_named() -> None:
    engine = SimpleNamespace(causal_lm=with_lora(other("llama, plain")))
    refuse(engine, "with LlamaForCausalLM: .*do not see peft's adapters")


# What follows runs DeepSpeed's own injection. When one of these fails, DeepSpeed has changed: look at the reason again.


@pytest.fixture
def kernels_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Construct DeepSpeed's layers where its kernels do not build, and leave its classes as they were."""
    monkeypatch.setattr(BaseOp, "inference_module", object())
    monkeypatch.setattr(DeepSpeedTransformerInference, "layer_id", 0)
    monkeypatch.setattr(DeepSpeedTransformerInference, "workspace", None)
    monkeypatch.setattr(DeepSpeedSelfAttention, "num_layers", 0)
    monkeypatch.setattr(DeepSpeedSelfAttention, "_qkv_buffers", [])
    monkeypatch.setattr(DeepSpeedMLP, "_inter_w_buffers", [])


def inject(model: Any) -> list[Any]:
    """DeepSpeed's containers over ``model``, made by its hybrid engine."""
    engine = DeepSpeedHybridEngine.__new__(DeepSpeedHybridEngine)
    nn.Module.__init__(engine)
    off = SimpleNamespace(enabled=False)
    hybrid = SimpleNamespace(max_out_tokens=64, inference_tp_size=1)
    engine.module, engine.mpu, engine.Z3_enabled = model, None, False
    engine._config = SimpleNamespace(float16_config=off, bfloat16_config=off, hybrid_engine=hybrid)
    engine._inference_containers, engine._orig_modules, engine._orig_fwds = [], [], []
    engine.create_inference_module()
    return engine._inference_containers


@pytest.mark.usefixtures("kernels_absent")
@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma2", "granite", "opt"])
def test_upstream_injects_nothing(name: str) -> None:
    assert inject(family(name)) == []


@pytest.mark.usefixtures("kernels_absent")
@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        ("gpt2", AttributeError, "set_params_wo_copy"),
        ("gpt_neox", AttributeError, "no attribute 'hidden_size'"),
        ("bloom", RuntimeError, "exceeds version 4.43.4"),
        ("llama, scaled RoPE", ValueError, "cannot serve rope_type='linear'"),
    ],
)
def test_upstream_fails_to_inject(model: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        inject(other(model) if model in OTHERS else family(model))


@pytest.mark.usefixtures("kernels_absent")
def test_upstream_corrupts_grouped_query_weights() -> None:
    model = family("llama")
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (16, 32)
    inject(model)
    assert (attention.k_proj.weight.shape, attention.v_proj.weight.shape) == ((32, 32), (0, 32))


@pytest.mark.usefixtures("kernels_absent")
def test_upstream_drops_biases_widths_and_activations() -> None:
    (biased, *_) = inject(other("llama, attention bias"))
    assert biased.module.attention.attn_qkvb is None
    assert biased.module.attention.attn_ob is None
    (wide, *_) = inject(other("llama, wide heads"))
    assert wide.module.config.rotary_dim == 8
    acts = {inject(other(name))[0].module.config.mlp_act_func_type for name in ("llama, gelu", "llama, plain")}
    assert len(acts) == 1


class Recorder(nn.Module):
    """Stands where the attention kernel does, and keeps the width of each mask that it is given."""

    attn_ob = None

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, hidden: Tensor, mask: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        self.widths.append(mask.shape[-1])
        return hidden, None, None, None, hidden


class PassOn(nn.Module):
    """Stands where the MLP kernel does."""

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        return hidden


def generate_injected(model: Any, monkeypatch: pytest.MonkeyPatch, unwrap: bool) -> list[int]:
    """Widths of the masks that DeepSpeed's first layer gets while ``model`` generates three tokens for two prompts."""
    monkeypatch.setattr(DeepSpeedTransformerInference, "allocate_workspace", lambda *_: None)
    widths: list[list[int]] = []
    for container in inject(model):
        widths.append([])
        container.module.attention, container.module.mlp = Recorder(widths[-1]), PassOn()
        injected = container.module.forward
        container.child.forward = (lambda *a, f=injected, **k: f(*a, **k)[0]) if unwrap else injected
    prompts = torch.tensor([[0, 0, 5, 6], [1, 7, 8, 9]])
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    type(model).generate(model, prompts, attention_mask=(prompts != 0).long(), **steps)
    return widths[0]


@pytest.mark.usefixtures("kernels_absent")
@pytest.mark.parametrize(("name", "unwrap"), [("llama, plain", True), ("gptj", False), ("gpt_neo", False)])
def test_upstream_leaves_the_cache_empty_so_later_masks_cover_one_position(
    name: str, unwrap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate_injected(other(name), monkeypatch, unwrap) == [4, 1, 1]  # 4, 5, 6 is what attention needs


@pytest.mark.usefixtures("kernels_absent")
def test_upstream_returns_a_tuple_where_llama_expects_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'size'"):
        generate_injected(other("llama, plain"), monkeypatch, unwrap=False)


@pytest.mark.usefixtures("kernels_absent")
def test_upstream_finds_no_adapter_of_peft() -> None:
    model = with_lora(other("llama, plain")).get_base_model()
    container = inject(model)[0]
    assert container.qw is model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert container.get_lora_params() == [[]] * 7
