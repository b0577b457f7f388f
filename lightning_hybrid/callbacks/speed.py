"""How fast training goes, in tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BATCHES = 20


class TokenSpeed:
    """Tokens per second over the last batches, of all ranks together if each has as many.

    Counted are the tokens that a module sampled (its ``last_rollout``), or else the tokens of its batch that are no
    padding. Nothing is read from the device until :meth:`per_second` is asked.

    Args:
        ranks: how many there are.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self._total: Tensor | None = None
        self._marks: deque[tuple[float, Tensor | None]] = deque([(time.perf_counter(), None)], maxlen=_BATCHES + 1)

    def add(self, module: Any, batch: Any) -> None:
        """Count a batch that is done."""
        rollout = getattr(module, "last_rollout", None)
        count = _real_tokens(batch) if rollout is None else rollout.response_mask.sum()
        if count is not None:
            self._total = count if self._total is None else self._total + count
            self._marks.append((time.perf_counter(), self._total))

    def per_second(self) -> float | None:
        """Tokens per second; None before the first batch, or where batches have no ``attention_mask``."""
        (begin, before), (end, after) = self._marks[0], self._marks[-1]
        if after is None or end <= begin:
            return None
        tokens = float(after) - (0.0 if before is None else float(before))
        return tokens * self.ranks / (end - begin)


def _real_tokens(batch: Any) -> Tensor | None:
    """Tokens of all texts in a batch, which may hold several batches by name."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.sum()
    counts = [count for count in map(_real_tokens, batch.values()) if count is not None]
    return torch.stack(counts).sum() if counts else None
