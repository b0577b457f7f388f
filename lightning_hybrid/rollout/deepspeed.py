"""Rollouts through the kernels that DeepSpeed injects: what keeps them from running a model, told before any work.

DeepSpeed 0.19.8 has containers for the decoder layers of a few families, made for the contract that transformers had
between a model and its layers in 2023. Of the models that this project accepts (transformers 5.10 and later) none is
left for which they sample the model's own distribution, so this backend never generates: :func:`reason_against` says
why, and which of DeepSpeed's files to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from deepspeed.module_inject.replace_policy import replace_policies
from torch import nn

from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.models import base_of
from lightning_hybrid.rollout import RolloutBackend

# By decoder layer: families that DeepSpeed has a policy for and still cannot inject.
BROKEN_POLICIES = {
    "OPTDecoderLayer": (
        "DeepSpeed leaves OPT out itself, because its layer for it knows only the tuple caches of old transformers "
        "(runtime/hybrid_engine.py, populate_all_inference_policies)"
    ),
    "GPT2Block": (
        "DeepSpeed's container for GPT-2 has no set_params_wo_copy, so it cannot share the trained weights "
        "(module_inject/containers/gpt2.py)"
    ),
    "GPTNeoXLayer": (
        "DeepSpeed's policy for GPT-NeoX reads attention.hidden_size, which transformers no longer has "
        "(module_inject/containers/gptneox.py)"
    ),
    "BloomBlock": (
        "DeepSpeed's container for BLOOM refuses every transformers after 4.43 (module_inject/containers/bloom.py)"
    ),
}
FOREIGN_CACHE = (
    "DeepSpeed's layer keeps keys and values in a workspace of its own and leaves transformers' cache empty, so after "
    "the first token the attention mask of a padded batch is one position wide and the kernel reads past its end "
    "(model_implementations/transformers/ds_transformer.py)"
)


class DeepSpeedRollout(RolloutBackend):
    """Refuse to generate, with the reason; takes what every backend takes."""

    def __init__(self, config: RolloutConfig, eos_ids: Sequence[int], pad_id: int, tokenizer: Any = None) -> None:
        pass

    def generate(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        seed: int,
        greedy: bool = False,
        indices: Sequence[int] | None = None,
        n: int = 1,
    ) -> NoReturn:
        """Say why DeepSpeed's kernels cannot generate with the engine's model.

        Args:
            engine: a :class:`~lightning_hybrid.engines.hybrid.HybridEngine`, or a bare causal LM.
            prompts: not read.
            seed: not read.
            greedy: not read.
            indices: not read.

        Raises:
            RolloutError: always, before any work.
        """
        model = base_of(getattr(engine, "causal_lm", engine))
        reason = reason_against(model, next(model.parameters()).device)
        raise RolloutError(
            f"rollout.backend=deepspeed cannot generate with {type(model).__name__}: {reason}; "
            "set rollout.backend=native, or hf for a model without a container"
        )


def reason_against(model: Any, device: torch.device) -> str:
    """Why DeepSpeed's injected kernels cannot run ``model`` on ``device``, in one sentence.

    What holds for the model on any device comes first.

    Args:
        model: a Hugging Face causal LM, or peft's model around one; nothing is run or changed.
        device: where it would generate.
    """
    base = base_of(model)
    layer = _decoder_layer(base)
    return (
        _without_policy(layer)
        or BROKEN_POLICIES.get(type(layer).__name__)
        or _with_adapters(layer)
        or _llama_reason(layer, base.config)
        or _off_cuda(device)
        or _of_the_contract(layer)
    )


def _decoder_layer(model: Any) -> nn.Module:
    layers = model.config.num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)
    stack = next(stacks, None)
    return model if stack is None else stack[0]


def _without_policy(layer: nn.Module) -> str | None:
    for policy in replace_policies:
        policy(None)  # a policy looks its layer class up when it is constructed
        classes = policy._orig_layer_class
        if type(layer) in (classes if isinstance(classes, list) else [classes]):
            return None
    return f"DeepSpeed has no policy for the layer {type(layer).__name__} (module_inject/replace_policy.py)"


def _with_adapters(layer: nn.Module) -> str | None:
    if any(hasattr(module, "base_layer") for module in layer.modules()):
        return "DeepSpeed's kernels read the base weights and do not see peft's adapters (module_inject/policy.py)"
    return None


def _llama_reason(layer: nn.Module, config: Any) -> str | None:
    """What a Llama configuration asks for and the container drops, most of it in silence."""
    if type(layer).__name__ != "LlamaDecoderLayer":
        return None
    return _llama_attention(config) or _llama_linears(config)


def _llama_attention(config: Any) -> str | None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads != heads:
        return (
            f"with {kv_heads} key/value heads for {heads} query heads (grouped-query attention) DeepSpeed's container "
            "cuts the fused weights wrongly and corrupts k and v (module_inject/containers/features/split_qkv.py)"
        )
    if config.head_dim != config.hidden_size // heads:
        return (
            f"DeepSpeed's container rotates hidden_size / heads = {config.hidden_size // heads} dimensions of a head, "
            f"and the model's heads have {config.head_dim} (module_inject/containers/llama.py)"
        )
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        return f"DeepSpeed's kernel knows no scaled RoPE, and rope_type is {rope!r} (module_inject/containers/llama.py)"
    return None


def _llama_linears(config: Any) -> str | None:
    if config.attention_bias or config.mlp_bias:
        return "DeepSpeed's container for Llama drops the biases of linear layers (module_inject/containers/llama.py)"
    if config.hidden_act != "silu":
        return (
            f"DeepSpeed's container for Llama computes silu whatever the model asks for, here {config.hidden_act!r} "
            "(module_inject/containers/llama.py)"
        )
    return None


def _off_cuda(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None
    where = "ops/op_builder/transformer_inference.py"
    return f"DeepSpeed's kernels run on CUDA alone, and the model is on {device.type} ({where})"


def _of_the_contract(layer: nn.Module) -> str:
    if type(layer).__name__ == "LlamaDecoderLayer":
        return f"{FOREIGN_CACHE}; it also returns a tuple where LlamaModel expects a tensor"
    return FOREIGN_CACHE
