"""Texts to token ids and token ids to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch

from lightning_hybrid.data.checking import Dropped, Problems
from lightning_hybrid.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TooLong = Literal["drop", "truncate", "error"]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens; texts may be longer than the model's positions."""
    if not texts:
        return []
    # verbose=False: the tokenizer's own remark on length knows nothing of max_length
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [list(ids) for ids in encoded]


def encode_segments(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Return the token ids of texts that come in segments, so that each border lies between two tokens.

    A segment gets the tokens that it has behind the one before it, where that one keeps its own there, and otherwise
    those that it has alone. So a prompt's tokens are the same whatever answer follows, as when the answer is sampled.
    """
    alone = iter(encode_texts(tokenizer, [text for segments in texts for text in segments]))
    pairs = [before + after for segments in texts for before, after in pairwise(segments)]
    joint = iter(encode_texts(tokenizer, pairs))
    encoded = []
    for segments in texts:
        own = [next(alone) for _ in segments]
        ids = own[:1]
        for before, after in pairwise(own):
            both = next(joint)
            ids.append(both[len(before) :] if both[: len(before)] == before else after)
        encoded.append(ids)
    return encoded


def with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Prepend the BOS id, where the tokenizer has one and the ids do not begin with it already."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Append the EOS id, where the ids do not end with it already.

    Raises:
        DataError: If the tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no EOS token, so no response could end: set one, or add_eos=False")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def keep_end(ids: list[int], max_length: int, bos: int | None) -> list[int]:
    """Cut from the left to ``max_length`` ids, keeping a BOS in front: the end of a text is what is judged."""
    if len(ids) <= max_length:
        return ids
    if bos is not None and ids[0] == bos and max_length > 1:
        return [bos, *ids[len(ids) - max_length + 1 :]]
    return ids[len(ids) - max_length :]


@dataclass(frozen=True)
class LengthRule:
    """What happens to a row with too many tokens.

    Attributes:
        max_length: Most tokens that a row may have, or ``None`` for no limit.
        too_long: ``drop`` (counted), ``truncate``, or ``error``.
        reserve: Tokens that must fit behind the row: ``max_new_tokens`` for prompts.
    """

    max_length: int | None
    too_long: TooLong
    reserve: int = 0

    def __post_init__(self) -> None:
        """Check that a row of one token fits.

        Raises:
            DataError: If it does not.
        """
        if self.room is not None and self.room < 1:
            raise DataError(
                f"max_new_tokens {self.reserve} leaves no room for a prompt within max_length {self.max_length} "
                "(the model's positions, or hybrid_engine.max_out_tokens): lower max_new_tokens"
            )

    @property
    def room(self) -> int | None:
        """Most tokens of a row itself."""
        return None if self.max_length is None else self.max_length - self.reserve

    def keeps(self, length: int, where: str, dropped: Dropped, problems: Problems) -> bool:
        """Tell whether a row of ``length`` tokens stays, and count or note it where it does not."""
        if self.room is None or length <= self.room or self.too_long == "truncate":
            return True
        plus = f" + max_new_tokens {self.reserve}" if self.reserve else ""
        if self.too_long == "drop":
            dropped.add(f"too long (tokens{plus} > max_length {self.max_length})")
        else:
            problems.add(where, f"{length} tokens{plus} > max_length {self.max_length}; shorten it, or set too_long")
        return False


def pad_batch(sequences: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Pad on the right to the longest sequence.

    Args:
        sequences: B lists of token ids.
        fill: The id to pad with.

    Returns:
        ``input_ids`` Long[B, T] and ``attention_mask`` Bool[B, T], True on tokens.
    """
    width = max(len(ids) for ids in sequences)
    input_ids = torch.tensor([[*ids, *[fill] * (width - len(ids))] for ids in sequences], dtype=torch.long)
    lengths = torch.tensor([len(ids) for ids in sequences])
    return input_ids, torch.arange(width) < lengths[:, None]


def pad_masks(masks: Sequence[Sequence[bool]]) -> Tensor:
    """Pad masks on the right with False, as :func:`pad_batch` pads their ids; Bool[B, T]."""
    width = max(len(mask) for mask in masks)
    return torch.tensor([[*mask, *[False] * (width - len(mask))] for mask in masks], dtype=torch.bool)
