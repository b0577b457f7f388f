"""What the device knows about the rows being generated, and what they have drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hybrid.containers.transfer import sent
from lightning_hybrid.generation.draw import Drawn

ALIVE, EOS, LENGTH, NOT_FINITE, FREE = range(5)


class Slots:
    """The state of each slot of the KV cache; live rows are in slots ``0 … rows - 1``.

    A slot whose row is not alive is frozen: passes that run over it change nothing that anybody reads.

    Args:
        state: the attributes, one above the other.

    Attributes, all long ``[slots]``:
        token: drawn last, not yet in the cache.
        status: :data:`ALIVE`, or why it ended.
        length: tokens in the cache; 0 where the row is not alive, so that attention has next to nothing to read.
        produced: tokens drawn.
        key: the response's random stream.
        row: of the results, where the response is written.
    """

    FIELDS = ("token", "status", "length", "produced", "key", "row")

    def __init__(self, state: Tensor) -> None:
        self.state = state
        self.token, self.status, self.length, self.produced, self.key, self.row = state.unbind()

    @classmethod
    def of_size(cls, slots: int, device: torch.device) -> Slots:
        """So many slots, all free."""
        made = cls(torch.zeros(len(cls.FIELDS), slots, dtype=torch.long, device=device))
        made.clear()
        return made

    def clear(self) -> None:
        """Free all slots."""
        self.state.zero_()
        self.status.fill_(FREE)

    def part(self, begin: int, end: int) -> Slots:
        """Slots ``begin`` to ``end``, a view."""
        return Slots(self.state[:, begin:end])

    @property
    def told(self) -> Tensor:
        """What the host hears after each pass: tokens and statuses, ``[2, slots]``, contiguous."""
        return self.state[:2]

    def assign(self, begin: int, lengths: Sequence[int], keys: Sequence[int], rows: Sequence[int]) -> None:
        """Start responses in the slots from ``begin`` on, their prompts in the cache."""
        zeros = [0] * len(rows)
        fresh = sent([zeros, [ALIVE] * len(rows), lengths, zeros, keys, rows], self.state.device)
        self.state[:, begin : begin + len(rows)] = fresh

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` to ``target`` (long ``[n]`` each, disjoint)."""
        self.state[:, target] = self.state[:, source]

    def free(self, begin: int, end: int) -> None:
        """Free slots ``begin`` to ``end``."""
        self.status[begin:end] = FREE
        self.length[begin:end] = 0


class Results:
    """What each response has drawn, written in place.

    Attributes, all ``[rows + 1, max_new_tokens + 1]``; the last row and column take what counts nowhere:
        tokens: long.
        policy, sampling: float32 log-probs.
        entropies: float32, or None.
    """

    def __init__(self, rows: int, max_new_tokens: int, entropy: bool, device: torch.device) -> None:
        shape = (rows + 1, max_new_tokens + 1)
        self.nowhere = rows
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.policy = torch.zeros(shape, device=device)
        self.sampling = torch.zeros(shape, device=device)
        self.entropies = torch.zeros(shape, device=device) if entropy else None

    def write(self, row: Tensor, column: Tensor, drawn: Drawn) -> None:
        """Write one token of each row."""
        self.tokens[row, column] = drawn.tokens
        self.policy[row, column] = drawn.policy_logprobs
        self.sampling[row, column] = drawn.sampling_logprobs
        if self.entropies is not None and drawn.entropies is not None:
            self.entropies[row, column] = drawn.entropies
