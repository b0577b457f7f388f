"""Prompts: what a policy answers during reinforcement learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from lightning_hybrid.data.checking import Dropped, Problems, notice, report_lost_characters, text_field
from lightning_hybrid.data.tokenizing import LengthRule, encode_texts, keep_end, with_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_hybrid.data.reading import Row


@dataclass(frozen=True)
class Prompt:
    """A prompt and where it was read."""

    text: str
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls."""
        return self.text


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of BOS and prompt, the text, and the prompt's place in its data set.

    Example:
        ``EncodedPrompt(ids=[1, 40, 41], text="mia visits", index=7)``
    """

    ids: list[int]
    text: str
    index: int


class PromptBatch(TypedDict):
    """B prompts, unpadded: on which side to pad is decided by the rollout.

    Example:
        ``{"prompt_ids": [[1, 40, 41], [1, 42]], "prompts": ["mia visits", "tom"], "index": [7, 2]}``
    """

    prompt_ids: list[list[int]]
    prompts: list[str]
    index: list[int]


def read_prompts(rows: Sequence[Row], prompt_key: str, first_words: int | None, problems: Problems) -> list[Prompt]:
    """Take the prompt out of each row, noting the rows that lack it.

    Args:
        rows: What was read.
        prompt_key: The prompt's name in a row.
        first_words: Cut each prompt to that many words (split at white space) and keep each result once. ``None``
            keeps the texts, repeated ones too.
        problems: Where problems are noted.

    Returns:
        The prompts in order; how many repeated ones were left out is logged.
    """
    texts = [text_field(row, prompt_key, problems) for row in rows]
    if first_words is None:
        return [Prompt(text, row.where) for text, row in zip(texts, rows, strict=True)]
    unique: dict[str, Prompt] = {}
    for text, row in zip(texts, rows, strict=True):
        cut = " ".join(text.split()[:first_words])
        unique.setdefault(cut, Prompt(cut, row.where))
    if len(unique) < len(rows):
        repeated = len(rows) - len(unique)
        notice(f"{repeated:,} of {len(rows):,} prompts of {problems.source} dropped: repeated after first_words")
    return list(unique.values())


def encode_prompts(
    examples: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, rule: LengthRule, source: str, *, bos: bool = True
) -> list[EncodedPrompt]:
    """Tokenise prompts.

    Args:
        examples: The texts.
        tokenizer: Its tokens.
        rule: What to do with prompts that leave too little room for ``rule.reserve`` new tokens; truncating keeps BOS
            and the end of the prompt.
        source: File names, for messages.
        bos: Begin with BOS, where the tokenizer has one.

    Returns:
        The prompts that stay, in order; empty ones are left out, and counted.

    Raises:
        DataError: If no prompt stays, or one is too long and ``rule.too_long`` is ``error``.
    """
    texts = [example.text for example in examples]
    encoded = encode_texts(tokenizer, texts)
    report_lost_characters(tokenizer, texts, encoded, source)
    kept: list[EncodedPrompt] = []
    dropped, problems = Dropped(source, len(examples)), Problems(source)
    for example, ids in zip(examples, encoded, strict=True):
        if not ids:
            dropped.add("with an empty prompt")
            continue
        ids = with_bos(tokenizer, ids) if bos else ids
        if rule.keeps(len(ids), example.where, dropped, problems):
            cut = ids if rule.room is None else keep_end(ids, rule.room, tokenizer.bos_token_id)
            # A reward judges what the policy was shown.
            text = example.text if len(cut) == len(ids) else str(tokenizer.decode(cut, skip_special_tokens=True))
            kept.append(EncodedPrompt(cut, text, len(kept)))
    problems.raise_if_any()
    dropped.report()
    return kept


def collate_prompts(examples: Sequence[EncodedPrompt]) -> PromptBatch:
    """Make one batch of lists; see `PromptBatch`."""
    return {
        "prompt_ids": [example.ids for example in examples],
        "prompts": [example.text for example in examples],
        "index": [example.index for example in examples],
    }
