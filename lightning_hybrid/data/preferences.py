"""Preferences: a chosen and a rejected text, for reward models; read as pairs or drawn from labelled texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from lightning_hybrid.data.checking import (
    Dropped,
    Problems,
    label_field,
    number_field,
    report_lost_characters,
    text_field,
)
from lightning_hybrid.data.tokenizing import LengthRule, encode_texts, keep_end, pad_batch, with_bos, with_eos
from lightning_hybrid.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lightning_hybrid.data.reading import Row


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt (empty where the texts are whole transcripts), the better one first."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls."""
        return f"{self.prompt}\n{self.chosen}\n{self.rejected}"


@dataclass(frozen=True)
class LabelledText:
    """A text and whether it is a positive one."""

    text: str
    positive: bool
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls."""
        return self.text


@dataclass(frozen=True)
class EncodedPreference:
    """Token ids of both texts, each with BOS, prompt, response and EOS, and by how much one is better, if known.

    Example:
        ``EncodedPreference(chosen=[1, 40, 50, 2], rejected=[1, 40, 51, 52, 2])``
    """

    chosen: list[int]
    rejected: list[int]
    margin: float | None = None


@dataclass(frozen=True)
class TextEncoder:
    """How one text becomes the token ids that a reward model scores.

    Attributes:
        tokenizer: Its tokens.
        rule: What to do with too many of them; truncating keeps BOS and the end of the text.
        add_eos: End with EOS.
        bos: Begin with BOS, where the tokenizer has one.
    """

    tokenizer: PreTrainedTokenizerBase
    rule: LengthRule
    add_eos: bool = True
    bos: bool = True

    def join(self, prompt: list[int], response: list[int]) -> list[int]:
        """Return BOS, prompt, response and EOS."""
        ids = prompt + response
        ids = with_bos(self.tokenizer, ids) if self.bos else ids
        return with_eos(self.tokenizer, ids) if self.add_eos else ids

    def cut(self, ids: list[int]) -> list[int]:
        """Return the ids within the limit: BOS and the end of the text."""
        return ids if self.rule.room is None else keep_end(ids, self.rule.room, self.tokenizer.bos_token_id)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts, cut to the limit."""
        return [self.cut(self.join([], ids)) for ids in encode_texts(self.tokenizer, texts)]


class PairDataset(Dataset[EncodedPreference]):
    """Positive-over-negative pairs drawn anew in each epoch, the same on every rank.

    Args:
        positive: Token ids of the positive texts.
        negative: Token ids of the negative texts.
        pairs: How many pairs make an epoch.
        seed: Of the draw, with the epoch and the index.
        epoch: Gives the number of the epoch.
    """

    def __init__(
        self,
        positive: Sequence[list[int]],
        negative: Sequence[list[int]],
        pairs: int,
        seed: int,
        epoch: Callable[[], int] | int = 0,
    ) -> None:
        self.positive = positive
        self.negative = negative
        self.pairs = pairs
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of pairs in an epoch."""
        return self.pairs

    def __getitem__(self, index: int) -> EncodedPreference:
        """Return the pair that belongs to the seed, the epoch and ``index``."""
        draw = random.Random(f"{self.seed} {self._epoch_number()} {index}")
        return EncodedPreference(draw.choice(self.positive), draw.choice(self.negative))

    def __getstate__(self) -> dict[str, Any]:
        """Give a worker process the number of the epoch instead of the trainer that knows it."""
        return {**self.__dict__, "epoch": self._epoch_number()}

    def _epoch_number(self) -> int:
        return self.epoch if isinstance(self.epoch, int) else self.epoch()


def read_preferences(
    rows: Sequence[Row],
    chosen_key: str,
    rejected_key: str,
    prompt_key: str | None,
    margin_key: str | None,
    problems: Problems,
) -> list[Preference]:
    """Take the two texts, and the prompt and margin where they have a key, out of each row, noting what is missing."""
    return [
        Preference(
            prompt="" if prompt_key is None else text_field(row, prompt_key, problems),
            chosen=text_field(row, chosen_key, problems),
            rejected=text_field(row, rejected_key, problems),
            margin=None if margin_key is None else number_field(row, margin_key, problems),
            where=row.where,
        )
        for row in rows
    ]


def read_labelled(rows: Sequence[Row], problems: Problems) -> list[LabelledText]:
    """Take ``text`` and ``label`` (0 or 1) out of each row, noting what is missing."""
    return [
        LabelledText(text_field(row, "text", problems), label_field(row, "label", problems), row.where) for row in rows
    ]


def encode_preferences(examples: Sequence[Preference], encoder: TextEncoder, source: str) -> list[EncodedPreference]:
    """Tokenise both texts of each pair, the prompt and the responses apart.

    Returns:
        The pairs that stay, in order: those with an empty text, two equal ones or too many tokens are left out, and
        counted.

    Raises:
        DataError: If no pair stays, or one is too long and the rule is ``error``.
    """
    columns = [[getattr(example, name) for example in examples] for name in ("prompt", "chosen", "rejected")]
    encoded = [encode_texts(encoder.tokenizer, texts) for texts in columns]
    report_lost_characters(encoder.tokenizer, sum(columns, []), sum(encoded, []), source)
    kept, dropped, problems = [], Dropped(source, len(examples)), Problems(source)
    for example, prompt, chosen, rejected in zip(examples, *encoded, strict=True):
        if not chosen or not rejected:
            dropped.add("with an empty text")
            continue
        whole = EncodedPreference(encoder.join(prompt, chosen), encoder.join(prompt, rejected), example.margin)
        longest = max(len(whole.chosen), len(whole.rejected))
        if not encoder.rule.keeps(longest, example.where, dropped, problems):
            continue
        pair = replace(whole, chosen=encoder.cut(whole.chosen), rejected=encoder.cut(whole.rejected))
        if pair.chosen == pair.rejected:
            dropped.add("with the same tokens in both texts")
            continue
        kept.append(pair)
    problems.raise_if_any()
    dropped.report()
    return kept


def encode_labelled(
    examples: Sequence[LabelledText], encoder: TextEncoder, source: str
) -> tuple[list[LabelledText], list[list[int]]]:
    """Tokenise labelled texts.

    Returns:
        The texts that stay, in order, and the token ids of each; empty and too long ones are left out, and counted.

    Raises:
        DataError: If no text stays, only one of the two labels is there, or one is too long and the rule is ``error``.
    """
    encoded = encode_texts(encoder.tokenizer, [example.text for example in examples])
    report_lost_characters(encoder.tokenizer, [example.text for example in examples], encoded, source)
    kept, token_ids, dropped, problems = [], [], Dropped(source, len(examples)), Problems(source)
    for example, ids in zip(examples, encoded, strict=True):
        whole = encoder.join([], ids)
        if not ids:
            dropped.add("with an empty text")
        elif encoder.rule.keeps(len(whole), example.where, dropped, problems):
            kept.append(example)
            token_ids.append(encoder.cut(whole))
    problems.raise_if_any()
    dropped.report()
    positive = sum(example.positive for example in kept)
    if not 0 < positive < len(kept):
        raise DataError(
            f"pairs need texts of both labels, but {source} has {positive:,} positive (1) and "
            f"{len(kept) - positive:,} negative (0) ones"
        )
    return kept, token_ids


def collate_preferences(examples: Sequence[EncodedPreference], fill: int) -> dict[str, dict[str, Tensor] | Tensor]:
    """Make one batch, each side padded on the right with the id ``fill``.

    Returns:
        ``chosen`` and ``rejected``, each with ``input_ids`` Long[B, T] and ``attention_mask`` Bool[B, T], True on
        tokens (T differs between the two), and ``margin`` Float[B] where the rows have one.
    """
    batch: dict[str, dict[str, Tensor] | Tensor] = {}
    for side in ("chosen", "rejected"):
        input_ids, attention_mask = pad_batch([getattr(example, side) for example in examples], fill)
        batch[side] = {"input_ids": input_ids, "attention_mask": attention_mask}
    margins = [example.margin for example in examples if example.margin is not None]
    if len(margins) == len(examples):
        batch["margin"] = torch.tensor(margins, dtype=torch.float32)
    return batch
