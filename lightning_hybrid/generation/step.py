"""The device's half of a pass: what a CUDA graph holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_hybrid.containers import Decoder, KVCache
from lightning_hybrid.containers.attention import make_decode
from lightning_hybrid.generation.draw import Drawn, Sampler
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.generation.slots import ALIVE, EOS, LENGTH, NOT_FINITE, Results, Slots


class Step:
    """One token for each of some slots.

    Nothing in it waits for the device, and all that it reads and writes stays at its address: weights, cache, slots,
    results. Where a slot's row is not alive it is computed and counts nowhere.

    Args:
        decoder: runs the model.
        cache: keys and values of the slots.
        slots: their state.
        results: where responses are written.
        sampling: how to draw.
        eos_ids: tokens that end a response.
        seen: which tokens each slot's row holds, ``[slots, vocabulary]`` bool; needed with a repetition penalty.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slots: Slots,
        results: Results,
        sampling: SamplingParams,
        eos_ids: Sequence[int],
        seen: Tensor | None = None,
    ) -> None:
        self.decoder, self.cache, self.slots, self.results = decoder, cache, slots, results
        self.sampling, self.seen = sampling, seen
        self.sampler = Sampler(sampling, eos_ids, decoder.device)

    def advance(self, rows: int, bounds: list[int]) -> None:
        """One more token in slots ``0 … rows - 1``.

        Args:
            rows: how many.
            bounds: at most so many tokens are in each row's cache; for attention that must know on the host.
        """
        part = self.slots.part(0, rows)
        attend = make_decode(self.cache, self.decoder.scores, part.length, bounds)
        hidden = self.decoder(part.token, part.length, attend)
        part.length.add_(part.status == ALIVE)
        self.draw(self.decoder.logits(hidden), 0, rows)

    def draw(self, logits: Tensor, begin: int, end: int) -> None:
        """Draw from ``logits`` ``[rows, vocabulary]`` for slots ``begin`` to ``end`` and note what came."""
        part = self.slots.part(begin, end)
        seen = None if self.seen is None else self.seen[begin:end]
        drawn = self.sampler(logits, part.key, part.produced, seen)
        alive = part.status == ALIVE
        self.results.write(part.row.masked_fill(~alive, self.results.nowhere), part.produced, drawn)
        part.token.copy_(drawn.tokens)
        part.produced.add_(alive)
        if seen is not None:
            seen.scatter_(1, drawn.tokens[:, None], True)
        self._end(part, drawn, alive)

    def _end(self, part: Slots, drawn: Drawn, alive: Tensor) -> None:
        """Freeze rows that were alive until now and are not any more."""
        part.status.masked_fill_(alive & (part.produced >= self.sampling.max_new_tokens), LENGTH)
        if len(self.sampler.eos_ids):
            at_eos = (drawn.tokens[:, None] == self.sampler.eos_ids).any(-1)
            part.status.masked_fill_(alive & at_eos, EOS)
        part.status.masked_fill_(alive & ~drawn.finite, NOT_FINITE)
        part.length.mul_(part.status == ALIVE)
