"""Preferences: a chosen and a rejected text, for reward models; read as pairs or drawn from labelled texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from lightning_hybrid.data.checking import Dropped, Problems
from lightning_hybrid.data.conversation import Text, identity_of
from lightning_hybrid.data.encoding import AnswerEncoder, EncodedText
from lightning_hybrid.data.fields import label_field, number_field, text_field
from lightning_hybrid.data.instructions import collate_instructions
from lightning_hybrid.data.tokenizing import LengthRule
from lightning_hybrid.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_hybrid.data.reading import Row


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt (empty where the texts are whole transcripts), the better one first."""

    prompt: Text
    chosen: str
    rejected: str
    margin: float | None
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls: the prompt, so that none is on both."""
        return identity_of(self.prompt) or f"{self.chosen}\n{self.rejected}"


@dataclass(frozen=True)
class LabelledResponse:
    """A response to a prompt, and whether such a one is desired."""

    prompt: Text
    response: str
    desirable: bool
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls: the prompt, so that none is on both."""
        return identity_of(self.prompt) or self.response


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
    """Both texts as token ids, each with BOS, prompt, response and EOS, and by how much one is better, if known.

    Example:
        ``EncodedPreference(chosen=EncodedText([1, 40, 50, 2], [False, False, True, True]), rejected=...)``
    """

    chosen: EncodedText
    rejected: EncodedText
    margin: float | None = None

    def __len__(self) -> int:
        """Tokens of the longer text."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class TextEncoder:
    """How texts become the token ids that a reward model scores.

    Attributes:
        answers: How prompts with responses become token ids; a whole text is a response without a prompt.
        rule: What to do with too many of them; truncating keeps BOS and the end of the text.
    """

    answers: AnswerEncoder
    rule: LengthRule

    def cut(self, text: EncodedText) -> EncodedText:
        """Return the text within the limit: BOS and its end."""
        return text.end(self.rule.room, self.answers.tokenizer.bos_token_id)

    def whole(self, texts: Sequence[str], where: Sequence[str], problems: Problems) -> list[EncodedText]:
        """Return whole texts, of any length; empty for an empty one."""
        return self.answers.answers([("", text) for text in texts], where, problems)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of whole texts, cut to the limit."""
        problems = Problems("texts")
        return [self.cut(text).ids for text in self.whole(texts, [""] * len(texts), problems)]


class PairDataset(Dataset[EncodedPreference]):
    """Positive-over-negative pairs drawn anew in each epoch, the same on every rank.

    Args:
        positive: The positive texts.
        negative: The negative texts.
        pairs: How many pairs make an epoch.
        seed: Of the draw, with the epoch and the index.
        epoch: Gives the number of the epoch.
    """

    def __init__(
        self,
        positive: Sequence[EncodedText],
        negative: Sequence[EncodedText],
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


def encode_preferences(
    examples: Sequence[Preference], encoder: TextEncoder, dropped: Dropped
) -> list[EncodedPreference]:
    """Tokenise both texts of each pair.

    Returns:
        The pairs that stay, in order: those with an empty text, two equal ones or too many tokens are left out, and
        counted.

    Raises:
        DataError: If no pair stays, or one is too long and the rule is ``error``, or the chat template refuses one or
            is missing.
    """
    kept, problems = [], Problems(dropped.source)
    where = [example.where for example in examples]
    chosen = encoder.answers.answers([(x.prompt, x.chosen) for x in examples], where, problems)
    problems.raise_if_any()  # what is wrong with a prompt is wrong on both sides
    rejected = encoder.answers.answers([(x.prompt, x.rejected) for x in examples], where, problems)
    problems.raise_if_any()
    for example, better, worse in zip(examples, chosen, rejected, strict=True):
        whole = EncodedPreference(better, worse, example.margin)
        if not better.ids or not worse.ids:
            dropped.add("with an empty text")
        elif encoder.rule.keeps(len(whole), example.where, dropped, problems):
            pair = replace(whole, chosen=encoder.cut(better), rejected=encoder.cut(worse))
            if pair.chosen.ids == pair.rejected.ids:
                dropped.add("with the same tokens in both texts")
            else:
                kept.append(pair)
    problems.raise_if_any()
    dropped.report()
    return kept


def encode_labelled(
    examples: Sequence[LabelledText], encoder: TextEncoder, dropped: Dropped
) -> tuple[list[LabelledText], list[EncodedText]]:
    """Tokenise labelled texts.

    Returns:
        The texts that stay, in order, and their token ids; empty and too long ones are left out, and counted.

    Raises:
        DataError: If no text stays, only one of the two labels is there, or one is too long and the rule is ``error``.
    """
    kept, encoded, problems = [], [], Problems(dropped.source)
    wholes = encoder.whole([example.text for example in examples], [example.where for example in examples], problems)
    for example, whole in zip(examples, wholes, strict=True):
        if not whole.ids:
            dropped.add("with an empty text")
        elif encoder.rule.keeps(len(whole), example.where, dropped, problems):
            kept.append(example)
            encoded.append(encoder.cut(whole))
    problems.raise_if_any()
    dropped.report()
    positive = sum(example.positive for example in kept)
    if not 0 < positive < len(kept):
        raise DataError(
            f"pairs need texts of both labels, but {dropped.source} has {positive:,} positive (1) and "
            f"{len(kept) - positive:,} negative (0) ones"
        )
    return kept, encoded


def collate_preferences(examples: Sequence[EncodedPreference], fill: int) -> dict[str, dict[str, Tensor] | Tensor]:
    """Make one batch, each side padded on the right with the id ``fill``.

    Returns:
        ``chosen`` and ``rejected``, each with ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T], True on tokens,
        and ``loss_mask`` Bool[B, T], True on the response and its EOS (T differs between the two); and ``margin``
        Float[B] where the rows have one.
    """
    batch: dict[str, dict[str, Tensor] | Tensor] = {
        side: collate_instructions([getattr(example, side) for example in examples], fill)
        for side in ("chosen", "rejected")
    }
    margins = [example.margin for example in examples if example.margin is not None]
    if len(margins) == len(examples):
        batch["margin"] = torch.tensor(margins, dtype=torch.float32)
    return batch
