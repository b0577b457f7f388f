"""The inference view of one decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.containers.family import Family, Norms
from lightning_hybrid.containers.norms import Norm, norm_of
from lightning_hybrid.containers.positions import Rotary, rotate
from lightning_hybrid.containers.projection import Part, Projection, part_of
from lightning_hybrid.containers.weights import Shard, Weights
from lightning_hybrid.errors import RolloutError

# Writes the new keys and values into the cache and attends: (layer, query, key, value) → [tokens, heads, head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def find(module: Any, path: str | None) -> Any:
    """What a dotted name leads to; None for the name None."""
    return None if path is None else reduce(getattr, path.split("."), module)


class Heads:
    """How many heads of which width, in all and on this rank."""

    def __init__(self, config: Any, shard: Shard) -> None:
        query = config.num_attention_heads
        key = getattr(config, "num_key_value_heads", None) or query
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // query
        self.all_query, self.all_key = query, key
        if key % shard.size:
            raise RolloutError(
                f"inference_tp_size={shard.size} does not divide the model's {key} key-value heads: "
                f"use a divisor of {key}"
            )
        self.query, self.key = query // shard.size, key // shard.size


class Layer:
    """Attention and MLP of one layer over the trained tensors.

    Args:
        layer: the trained layer.
        family: what its parts are called.
        config: of the model.
        index: of the layer, from 0.
        weights: where parameters' values are.
        shard: this rank's share.
    """

    def __init__(
        self, layer: nn.Module, family: Family, config: Any, index: int, weights: Weights, shard: Shard
    ) -> None:
        self.index = index
        self.family = family
        self.heads = Heads(config, shard)
        self.parallel = bool(family.parallel and getattr(config, family.parallel))
        # Not the module's call: ZeRO-3's hooks would take it for a step of training.
        activation = find(layer, family.activation)
        self.activation = getattr(activation, "forward", activation)
        self._binding = (weights, index + 1)
        attention = find(layer, family.attention)
        self.qkv = Projection(self._qkv_parts(attention, shard))
        self.attention_out = self._back(find(attention, family.attention_out), shard, self.heads.dim)
        self.q_norm = norm_of(find(attention, family.q_norm), weights, index + 1, family.unit_offset)
        self.k_norm = norm_of(find(attention, family.k_norm), weights, index + 1, family.unit_offset)
        self.mlp_in = Projection(self._mlp_parts(layer, shard))
        self.mlp_out = self._back(find(layer, family.mlp_out), shard, 1)
        self._bind_norms(layer, family.norms_of(config))

    def __call__(self, x: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        """``[tokens, width]`` → the same shape.

        Args:
            x: hidden states of new tokens.
            rotary: cosine and sine at their positions.
            attend: attention over the cache, which takes in what is new.
        """
        attended = self.attention_out(self._attend(self.attention_in(x), rotary, attend))
        attended = self.attention_norm_out(attended)
        if self.parallel:
            return self._mlp(self.mlp_norm_in(x)) + attended + x
        x = self.attention_sum(x + attended)
        return self.mlp_sum(x + self.mlp_norm_out(self._mlp(self.mlp_norm_in(x))))

    def _attend(self, x: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        query, key, value = self._split(self.qkv(x), rotary)
        return attend(self.index, query, key, value).reshape(len(x), -1)

    def _split(self, projected: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normalised and rotated, ``[tokens, heads, head_dim]`` each."""
        heads = self.heads
        if self.family.interleaved:
            query, key, value = projected.view(-1, heads.query, 3, heads.dim).unbind(2)
        elif self.family.q_norm is None and rotary is not None:
            # Queries and keys lie next to each other: rotated in one go.
            both, value = projected.view(-1, heads.query + 2 * heads.key, heads.dim).split(
                [heads.query + heads.key, heads.key], 1
            )
            query, key = rotate(both, rotary).split([heads.query, heads.key], 1)
            return query, key, value
        else:
            stacked = projected.view(-1, heads.query + 2 * heads.key, heads.dim)
            query, key, value = stacked.split([heads.query, heads.key, heads.key], 1)
        query, key = self.q_norm(query), self.k_norm(key)
        return (query, key, value) if rotary is None else (rotate(query, rotary), rotate(key, rotary), value)

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = self.mlp_in(x)
        if not self.family.gated:
            return self.mlp_out(self.activation(hidden))
        gate, up = hidden.chunk(2, -1)
        return self.mlp_out(self.activation(gate) * up)

    def _qkv_parts(self, attention: nn.Module, shard: Shard) -> list[Part]:
        """q, k, v in this order; one part where one parameter holds all of them and this rank needs all."""
        weights, unit = self._binding
        modules = [find(attention, name) for name in self.family.qkv]
        heads = self.heads
        if self.family.interleaved:
            rows = _scaled(shard.bounds(heads.all_query), 3 * heads.dim)
            return [part_of(modules[0], weights, unit, rows if shard.size > 1 else None)]
        counts = [heads.all_query, heads.all_key, heads.all_key]
        return self._stacked(modules, [count * heads.dim for count in counts], shard, heads.dim)

    def _mlp_parts(self, layer: nn.Module, shard: Shard) -> list[Part]:
        modules = [find(layer, name) for name in self.family.mlp_in]
        sections = 2 if self.family.gated else 1
        width = sum(out_features(module) for module in modules) // sections
        return self._stacked(modules, [width] * sections, shard, 1)

    def _stacked(self, modules: list[Any], sizes: list[int], shard: Shard, grain: int) -> list[Part]:
        """This rank's rows of each section, whether the sections are modules or stacked in one."""
        weights, unit = self._binding
        if shard.size == 1:
            return [part_of(module, weights, unit) for module in modules]
        parts, offset = [], 0
        for i, size in enumerate(sizes):
            begin, end = _scaled(shard.bounds(size // grain), grain)
            module = modules[i] if len(modules) > 1 else modules[0]
            shift = 0 if len(modules) > 1 else offset
            parts.append(part_of(module, weights, unit, (shift + begin, shift + end)))
            offset += size
        return parts

    def _back(self, module: Any, shard: Shard, grain: int) -> Projection:
        """A projection back to the model's width, of which a rank holds the columns that its share feeds."""
        weights, unit = self._binding
        columns = _scaled(shard.bounds(in_features(module) // grain), grain) if shard.size > 1 else None
        return Projection([part_of(module, weights, unit, None, columns)], shard)

    def _bind_norms(self, layer: nn.Module, norms: Norms) -> None:
        def bound(path: str | None) -> Norm:
            return norm_of(find(layer, path), *self._binding, self.family.unit_offset)

        self.attention_in, self.mlp_norm_in = bound(norms.attention_in), bound(norms.mlp_in)
        self.attention_norm_out, self.mlp_norm_out = bound(norms.attention_out), bound(norms.mlp_out)
        self.attention_sum, self.mlp_sum = bound(norms.attention_sum), bound(norms.mlp_sum)


def out_features(module: Any) -> int:
    """Outputs of a linear layer, whole also where its weight is sharded."""
    base = getattr(module, "base_layer", module)
    return int(base.nf if type(base).__name__ == "Conv1D" else base.out_features)


def in_features(module: Any) -> int:
    """Inputs of a linear layer, whole also where its weight is sharded."""
    base = getattr(module, "base_layer", module)
    return int(base.nx if type(base).__name__ == "Conv1D" else base.in_features)


def _scaled(bounds: tuple[int, int], factor: int) -> tuple[int, int]:
    return bounds[0] * factor, bounds[1] * factor


def embed(ids: Tensor, table: Tensor, shard: Shard, rows: int) -> Tensor:
    """Rows of an embedding of which this rank holds its share, ``[tokens, width]``."""
    if shard.size == 1:
        return torch.nn.functional.embedding(ids, table)
    begin, end = shard.bounds(rows)
    outside = (ids < begin) | (ids >= end)
    local = torch.nn.functional.embedding((ids - begin).masked_fill(outside, 0), table)
    return shard.sum(local.masked_fill(outside[:, None], 0.0))
