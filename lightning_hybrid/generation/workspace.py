"""What generation keeps between calls: the KV cache, buffers of its size, and captured steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hybrid.containers import Decoder, KVCache
from lightning_hybrid.containers.norms import LayerNorm, RMSNorm
from lightning_hybrid.containers.projection import Projection
from lightning_hybrid.generation.graphs import GraphSteps, PlainSteps, Steps, Studio, graphs_serve
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.generation.slots import Results, Slots
from lightning_hybrid.generation.step import Step

# Ways of sampling whose graphs are kept: a run has one for training and one for evaluation.
KEPT = 2
Way = tuple[SamplingParams, tuple[int, ...]]


class Workspace:
    """Memory of generation, made for so many rows of so many tokens.

    Args:
        decoder: whose cache it is.
        slots: rows at once.
        capacity: tokens a row may have.
    """

    def __init__(self, decoder: Decoder, slots: int, capacity: int) -> None:
        self.cache: KVCache = decoder.cache(slots, capacity)
        self.slots = Slots.of_size(slots, decoder.device)
        self._seen: Tensor | None = None
        self._kept: dict[Way, GraphSteps] = {}

    def fits(self, decoder: Decoder, slots: int, capacity: int, budget: int | None = None) -> bool:
        """Whether it serves a call of this size as well as a new one would, within a budget of tokens."""
        cache, data = self.cache, self.cache.data
        if data.device != decoder.device or data.dtype != decoder.dtype:
            return False
        if budget is not None and cache.slots * cache.capacity > budget:
            return False
        return cache.slots >= slots and capacity <= cache.capacity <= 2 * capacity

    def steps(self, decoder: Decoder, sampling: SamplingParams, eos_ids: Sequence[int], rows: int) -> Steps:
        """Decode steps into results for ``rows`` responses, from graphs where the device has them.

        Graphs captured in an earlier call serve again while all that they point to is where it was: optimizers update
        weights in place.
        """
        if not graphs_serve(decoder):
            return PlainSteps(self._step(decoder, sampling, eos_ids, rows))
        if not decoder.weights.lasting:
            # The weights are copies made for this call: graphs that pointed to them would keep them in memory.
            return GraphSteps(self._step(decoder, sampling, eos_ids, rows), Studio(decoder.device))
        key = (sampling, tuple(eos_ids))
        kept = self._kept.get(key)
        if kept is None or not serves(kept.step, decoder, rows):
            kept = self._keep(key, self._step(decoder, sampling, eos_ids, rows))
        return kept

    def _keep(self, key: Way, step: Step) -> GraphSteps:
        """Graph steps that share their memory with those kept already.

        Where one of those is of no use any more all are dropped: memory of graphs that are gone cannot be shared.
        """
        stale = any(not serves(kept.step, step.decoder) for kept in self._kept.values())
        if stale or key in self._kept or len(self._kept) >= KEPT:
            self._kept.clear()
        studios = [kept.studio for kept in self._kept.values()]
        self._kept[key] = GraphSteps(step, studios[0] if studios else Studio(step.decoder.device))
        return self._kept[key]

    def _step(self, decoder: Decoder, sampling: SamplingParams, eos_ids: Sequence[int], rows: int) -> Step:
        # Up to the next power of two, so that the next call, of a few responses more, needs no new graphs.
        results = Results(1 << (rows - 1).bit_length(), sampling.max_new_tokens, sampling.entropy, decoder.device)
        seen = self._tokens_seen(decoder.head_rows) if sampling.repetition_penalty != 1.0 else None
        return Step(decoder, self.cache, self.slots, results, sampling, eos_ids, seen)

    def _tokens_seen(self, vocabulary: int) -> Tensor:
        if self._seen is None:
            shape = (self.cache.slots, vocabulary)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.cache.data.device)
        return self._seen


def serves(step: Step, decoder: Decoder, rows: int = 0) -> bool:
    """Whether a step captured with another decoder computes what one with ``decoder`` would, for ``rows`` responses."""
    before = step.decoder
    return (
        rows <= step.results.nowhere
        and fingerprint(before) == fingerprint(decoder)
        and all(torch.equal(old[: len(new)], new) for old, new in zip(_tables(before), _tables(decoder), strict=True))
    )


def fingerprint(decoder: Decoder) -> list[float]:
    """Where all tensors are that a decoder reads and an optimizer updates, and what LoRA adapters are scaled by."""
    inside = [piece for layer in decoder.layers for piece in vars(layer).values()]
    around = [decoder.embedding_norm, decoder.project_in, decoder.project_out, decoder.final_norm, decoder.head]
    found: list[float] = [decoder.embedding.data_ptr()]
    if decoder.position_table is not None:
        found.append(decoder.position_table.data_ptr())
    for piece in [*inside, *around]:
        if isinstance(piece, Projection):
            for part in piece.parts:
                found += _addresses(part.weight, part.bias)
                for adapter in part.adapters:
                    found += [*_addresses(adapter.down, adapter.up), adapter.scale]
        elif isinstance(piece, (LayerNorm, RMSNorm)):
            found += _addresses(piece.weight, getattr(piece, "bias", None))
    return found


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


def _tables(decoder: Decoder) -> list[Tensor]:
    """Rotary tables, made for as many positions as a call needs."""
    return [] if decoder.rotary is None else [table for pair in decoder.rotary.tables.values() for table in pair]
