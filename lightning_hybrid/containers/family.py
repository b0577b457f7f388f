"""What a model family calls its parts: all that a container needs to know, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Norms:
    """Where a layer normalises: names inside the layer, None for nowhere.

    ``attention_in`` and ``mlp_in`` come before the block, ``attention_out`` and ``mlp_out`` on what it returns before
    it is added (Gemma), ``attention_sum`` and ``mlp_sum`` on the sum (OPT-350m).
    """

    attention_in: str | None = None
    attention_out: str | None = None
    attention_sum: str | None = None
    mlp_in: str | None = None
    mlp_out: str | None = None
    mlp_sum: str | None = None


def no_reason(config: Any) -> str | None:
    """Nothing in ``config`` is beyond the container."""
    return None


@dataclass(frozen=True)
class Family:
    """The parts of a decoder-only family, as dotted names; the defaults are Llama's.

    Attributes:
        trunk: the decoder, in the causal LM; the next group of names is found inside it.
        embedding: token embedding.
        position_embedding: learned positions, None for none; ``position_offset`` is added to each position.
        embedding_norm: norm on the embeddings.
        project_in: from the width of the embedding to the trunk's.
        project_out: back, before the head.
        rotary: module that gives cosine and sine; None for none.
        alibi: linear position biases (Press et al. 2022).
        layers: the list of layers; the next group of names is found inside each.
        final_norm: norm before the head.
        attention: the attention module, and ``scale`` the name of its scaling factor in it.
        qkv: names in the attention module: three projections, or one that holds ``[q; k; v]``.
        interleaved: the one projection holds ``[heads, 3, head_dim]`` instead.
        attention_out: name in the attention module.
        q_norm: norm of each head's query, in the attention module; ``k_norm`` of its key.
        mlp_in: one projection, two (gate, up), or one that holds ``[gate; up]`` where ``gated``.
        mlp_out: the projection back.
        activation: the activation function.
        norms: where a layer normalises; a function of the configuration where that differs.
        unit_offset: RMS norms multiply by ``1 + weight`` (Gemma).
        parallel: name of the configuration's flag for attention and MLP side by side; None for never.
        window: sliding windows of ``config.sliding_window``: in no layer, in all, or by ``config.layer_types``.
        unsupported: from a configuration to why the container cannot run it, or None.
    """

    trunk: str = "model"
    embedding: str = "embed_tokens"
    position_embedding: str | None = None
    position_offset: int = 0
    embedding_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    rotary: str | None = "rotary_emb"
    alibi: bool = False
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    scale: str = "scaling"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    interleaved: bool = False
    attention_out: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    mlp_out: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    norms: Norms | Callable[[Any], Norms] = field(
        default=Norms(attention_in="input_layernorm", mlp_in="post_attention_layernorm")
    )
    unit_offset: bool = False
    parallel: str | None = None
    window: Literal["none", "all", "by_type"] = "none"
    unsupported: Callable[[Any], str | None] = no_reason

    def norms_of(self, config: Any) -> Norms:
        """Where a layer of a model with this configuration normalises."""
        return self.norms(config) if callable(self.norms) else self.norms

    def windows(self, config: Any) -> list[int | None]:
        """Each layer's sliding window in tokens, None for all tokens."""
        size = getattr(config, "sliding_window", None)
        if self.window == "none" or size is None:
            return [None] * config.num_hidden_layers
        if self.window == "all":
            return [size] * config.num_hidden_layers
        return [size if kind == "sliding_attention" else None for kind in config.layer_types]
