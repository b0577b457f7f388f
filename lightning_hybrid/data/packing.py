"""Packing: several texts in one row, none of which sees another.

A row holds texts one after the other. The positions of each begin at 0 again, from which the model knows where one ends
and the next begins: attention stays within a text.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from lightning_hybrid.data.balancing import lengths_of
from lightning_hybrid.data.encoding import EncodedText
from lightning_hybrid.data.tokenizing import pad_batch, pad_masks

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_hybrid.data.streaming import StreamedDataset

Row = list[EncodedText]


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Share texts out among as few rows as a greedy rule finds: the longest first, each where it fits best.

    This is best-fit decreasing (Johnson et al. 1974), which needs at most 11/9 of the fewest rows possible. Equal
    lengths keep their order, so the same texts are always packed alike.

    Args:
        lengths: Tokens of each text, at most ``room``.
        room: Tokens of a row.

    Returns:
        For each row the indices of its texts in ascending order; rows are ordered by their first.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # by the tokens that are left in them
    left: list[int] = []  # the keys of open_rows, in order
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(left, lengths[index])
        if place < len(left):
            remaining = left[place]
            row = open_rows[remaining].pop()
            if not open_rows[remaining]:
                del open_rows[remaining], left[place]
        else:
            remaining, row = room, len(rows)
            rows.append([])
        rows[row].append(index)
        remaining -= lengths[index]
        if remaining not in open_rows:
            bisect.insort(left, remaining)
        open_rows.setdefault(remaining, []).append(row)
    return sorted(sorted(row) for row in rows)


class PackedDataset(Dataset[Row]):
    """Texts, several to a row.

    Args:
        texts: Each at most ``room`` tokens long; of a stream, none is read before its row is asked for.
        room: Tokens of a row.
    """

    def __init__(self, texts: Sequence[EncodedText] | StreamedDataset, room: int) -> None:
        self.texts = texts
        self.rows = pack(lengths_of(texts), room)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """The texts of one row."""
        return [self.texts[i] for i in self.rows[index]]


def collate_packed(rows: Sequence[Row], fill: int) -> dict[str, Tensor]:
    """Make one batch of packed rows, padded on the right with the id ``fill``.

    Returns:
        ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T], True on tokens, ``loss_mask`` Bool[B, T], True on
        responses and their EOS, ``position_ids`` Long[B, T], from 0 in each text and 0 on padding, and ``sequence``
        Long[B, T], 0 on padding and 1, 2, ... on the texts of a row.
    """
    input_ids, attention_mask = pad_batch([[i for text in row for i in text.ids] for row in rows], fill)
    loss_mask = pad_masks([[learned for text in row for learned in text.learned] for row in rows])
    position_ids, _ = pad_batch([[i for text in row for i in range(len(text))] for row in rows], 0)
    sequence, _ = pad_batch([[n for n, text in enumerate(row, start=1) for _ in text.ids] for row in rows], 0)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "loss_mask": loss_mask,
        "position_ids": position_ids,
        "sequence": sequence,
    }
