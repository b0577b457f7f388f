"""The inference view of a whole causal LM: embedding, layers, norm and head over the trained tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.containers.attention import Scores
from lightning_hybrid.containers.cache import KVCache
from lightning_hybrid.containers.family import Family
from lightning_hybrid.containers.layer import Attend, Heads, Layer, embed, find
from lightning_hybrid.containers.norms import norm_of
from lightning_hybrid.containers.positions import RotaryTables, alibi_slopes
from lightning_hybrid.containers.projection import Projection, part_of, trained
from lightning_hybrid.containers.weights import InPlace, Shard, Weights
from lightning_hybrid.models import scaled_logits


class Decoder:
    """Runs a causal LM a few tokens at a time, reading the tensors that the optimizer updates.

    Args:
        model: the causal LM.
        family: what its parts are called.
        positions: how many positions will be used at most.
        weights: where parameters' values are; by default in the parameters.
        shard: this rank's share; by default all.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        positions: int,
        weights: Weights | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.config = model.config.get_text_config()
        self.weights: Weights = weights or InPlace()
        self.shard = shard or Shard()
        self.trunk = find(model, family.trunk)
        layers = find(self.trunk, family.layers)
        self.layers = [Layer(layer, family, self.config, i, self.weights, self.shard) for i, layer in enumerate(layers)]
        self.heads = Heads(self.config, self.shard)
        self._bind_ends(model, family)
        layer_types = self.config.layer_types if _per_type(find(self.trunk, family.rotary)) else None
        self.rotary = None
        if family.rotary is not None:
            self.rotary = RotaryTables(find(self.trunk, family.rotary), layer_types, positions, self.embedding)
        self.scores = self._scores(layers, family)

    def _bind_ends(self, model: Any, family: Family) -> None:
        last = len(self.layers) + 1
        embedding, head = trained(find(self.trunk, family.embedding)), trained(model.get_output_embeddings())
        self.vocabulary = int(embedding.num_embeddings)
        rows = self.shard.bounds(self.vocabulary) if self.shard.size > 1 else None
        self.embedding = part_of(embedding, self.weights, 0, rows).weight
        scale = getattr(embedding, "embed_scale", None)  # Gemma's, beside the embedding
        self.embedding_scale = None if scale is None else scale.to(self.embedding.dtype)
        self.embedding_norm = norm_of(find(self.trunk, family.embedding_norm), self.weights, 0)
        table = find(self.trunk, family.position_embedding)
        self.position_table = None if table is None else self.weights.of(table.weight, 0)
        self.position_offset = family.position_offset
        self.project_in = self._optional(find(self.trunk, family.project_in), 0)
        self.project_out = self._optional(find(self.trunk, family.project_out), last)
        self.final_norm = norm_of(find(self.trunk, family.final_norm), self.weights, last, family.unit_offset)
        self.head_rows = int(getattr(head, "out_features", self.vocabulary))
        rows = self.shard.bounds(self.head_rows) if self.shard.size > 1 else None
        self.head = Projection([part_of(head, self.weights, last, rows)])

    def _optional(self, module: nn.Module | None, unit: int) -> Projection | None:
        return None if module is None else Projection([part_of(module, self.weights, unit)])

    def _scores(self, layers: Any, family: Family) -> list[Scores]:
        slopes = None
        if family.alibi:
            begin, end = self.shard.bounds(self.heads.all_query)
            slopes = alibi_slopes(self.heads.all_query)[begin:end].to(self.embedding.device)
        softcap = getattr(self.config, "attn_logit_softcapping", None)
        return [
            Scores(float(find(layer, f"{family.attention}.{family.scale}")), window, softcap, slopes)
            for layer, window in zip(layers, family.windows(self.config), strict=True)
        ]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.embedding.dtype

    def cache(self, slots: int, capacity: int) -> KVCache:
        """A KV cache for ``slots`` rows of up to ``capacity`` tokens."""
        return KVCache(len(self.layers), slots, self.heads.key, capacity, self.heads.dim, self.embedding)

    def bytes_per_slot(self, capacity: int) -> int:
        """Memory of one row of a KV cache."""
        return KVCache.bytes_per_slot(len(self.layers), self.heads.key, capacity, self.heads.dim, self.dtype)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend, check: bool = False) -> Tensor:
        """Run the layers.

        Args:
            tokens: ``[tokens]`` long.
            positions: ``[tokens]`` long, each token's position in its row.
            attend: attention over the cache.
            check: raise where numbers first stop being finite; slow.

        Returns:
            ``[tokens, width]``, hidden states before the final norm.

        Raises:
            FloatingPointError: with ``check``, naming the part of the model.
        """
        self.weights.fetch(0)
        x = self._embed(tokens, positions)
        if check:
            _refuse_infinite(x, "the embedding")
        rotary = None if self.rotary is None else self.rotary.at(positions)
        for i, layer in enumerate(self.layers):
            self.weights.fetch(i + 1)
            x = layer(x, None if rotary is None else rotary[self.rotary.kind(i)], attend)  # type: ignore[union-attr]
            if check:
                _refuse_infinite(x, f"layer {i}")
        self.weights.fetch(len(self.layers) + 1)
        return x

    def idle(self) -> None:
        """Take part in what all ranks fetch for a pass, without tokens."""
        for unit in range(len(self.layers) + 2):
            self.weights.fetch(unit)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[rows, vocabulary]`` float32 of hidden states ``[rows, width]`` that the layers returned last."""
        x = self.final_norm(hidden)
        if self.project_out is not None:
            x = self.project_out(x)
        return scaled_logits(self.config, self.shard.join(self.head(x), self.head_rows)).float()

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = embed(tokens, self.embedding, self.shard, self.vocabulary)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.position_table is not None:
            x = x + nn.functional.embedding(positions + self.position_offset, self.position_table)
        return self.embedding_norm(x)


def _per_type(rotary: Any) -> bool:
    """Whether a rotary module has frequencies for each type of layer."""
    return isinstance(getattr(rotary, "rope_type", None), dict)


def _refuse_infinite(x: Tensor, where: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(where)
