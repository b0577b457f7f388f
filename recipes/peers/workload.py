"""What every peer is asked for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES = ("Ann", "Ben", "Lily", "Tom", "Sue", "Max", "Mia", "Tim")
_KINDS = ("girl", "boy", "dog", "cat", "bird", "bear", "frog", "fish")
_DEEDS = (
    "went to the park",
    "found a big red ball in the garden",
    "did not want to share",
    "saw something very strange behind the old tree",
)

NUMBER_EOS = 1  # the EOS of a random model's tokenizer


@dataclass(frozen=True)
class Workload:
    """Prompts, and how to sample one response to each: temperature 1, no top-k, no top-p.

    Attributes:
        texts: the prompts as text; encoded, they are ``prompts``.
        prompts: token ids.
        max_new_tokens: tokens that a response may have.
        eos_ids: ids that end a response.
        pad_id: an id to pad with.
    """

    texts: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int

    def __str__(self) -> str:
        return f"{len(self.prompts)} prompts × {self.max_new_tokens} tokens"

    def cut(self, rows: int, max_new_tokens: int) -> Workload:
        """The same for the first prompts and fewer tokens."""
        return replace(self, texts=self.texts[:rows], prompts=self.prompts[:rows], max_new_tokens=max_new_tokens)

    def until_eos(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows of sampled ids, each up to its first EOS (included) and no longer than asked for."""
        ends = set(self.eos_ids)
        return [list(row[: _length(row, ends)][: self.max_new_tokens]) for row in rows]

    def tell(self, model: Any) -> None:
        """Set the ids that end a response and the one that pads, for those who read them off the model."""
        model.generation_config.eos_token_id = list(self.eos_ids)
        model.generation_config.pad_token_id = self.pad_id


def _length(row: Sequence[int], ends: set[int]) -> int:
    return next((i + 1 for i, token in enumerate(row) if token in ends), len(row))


def make_workload(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, eos_ids: Sequence[int]
) -> Workload:
    """Encode the prompts."""
    prompts = tuple(tuple(ids) for ids in tokenizer(list(texts))["input_ids"])
    return Workload(tuple(texts), prompts, max_new_tokens, tuple(eos_ids), tokenizer.pad_token_id or 0)


def story_prompts(count: int) -> list[str]:
    """Openings of children's stories, 256 different ones; they break off, so that no response is over at once."""
    openings = [
        f"Once upon a time, a {kind} named {name} {deed} and"
        for deed, kind, name in itertools.product(_DEEDS, _KINDS, _NAMES)
    ]
    return [openings[i * 37 % len(openings)] for i in range(count)]  # 37: neighbours differ in everything


def random_prompts(count: int, shortest: int, longest: int, vocab_size: int) -> list[str]:
    """Random ids as text for :func:`peers.subject.number_tokenizer`, lengths evenly spread over the range."""
    draw = random.Random(0)
    lengths = (draw.randint(shortest, longest) for _ in range(count))
    return [" ".join(str(draw.randrange(2, vocab_size)) for _ in range(length)) for length in lengths]


def every_nth_id(vocab_size: int, max_new_tokens: int) -> list[int]:
    """Ids that end the responses of a random model: so many that lengths have a long tail, cut at the maximum.

    Nearly uniform next-token probabilities and one EOS in ``max_new_tokens / 4`` ids give geometric lengths: half of
    the responses stop within a sixth of the maximum, and one in fifty reaches it. Any peer can be told these ids.
    """
    stride = max(2, max_new_tokens // 4)
    return sorted({NUMBER_EOS, *range(stride - 1, vocab_size, stride)})
