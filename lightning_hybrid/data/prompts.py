"""Prompts: what a policy answers during reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

from lightning_hybrid.data.checking import Dropped, Problems, notice
from lightning_hybrid.data.conversation import Text, identity_of
from lightning_hybrid.data.encoding import AnswerEncoder
from lightning_hybrid.data.fields import text_field
from lightning_hybrid.data.templates import TURNS, as_messages, as_turns
from lightning_hybrid.data.tokenizing import LengthRule, keep_end

if TYPE_CHECKING:
    from lightning_hybrid.data.reading import Row


@dataclass(frozen=True)
class Prompt:
    """A prompt, where it was read, and the other columns of its row, such as the right answer."""

    text: Text
    where: str
    fields: Mapping[str, object] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls."""
        return identity_of(self.text)


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of BOS and prompt, the text, the prompt's place in its data set, and the other columns of its row.

    Example:
        ``EncodedPrompt(ids=[1, 40, 41], text="mia visits", index=7)``
    """

    ids: list[int]
    text: str
    index: int
    fields: Mapping[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)


class PromptBatch(TypedDict):
    """B prompts, unpadded: on which side to pad is decided by the rollout.

    ``prompts`` are texts; of a conversation, what the chat template makes of it, without BOS. ``fields`` are the other
    columns of the rows, one value for each prompt, None where a row has none; with ``prompt_turns``, the turns of those
    that pass through a chat template, where there are any.

    Example:
        ``{"prompt_ids": [[1, 40, 41], [1, 42]], "prompts": ["mia visits", "tom"], "index": [7, 2],
        "fields": {"answer": ["the farm", "the market"]}}``
    """

    prompt_ids: list[list[int]]
    prompts: list[str]
    index: list[int]
    fields: dict[str, list[object]]


def read_prompts(rows: Sequence[Row], prompt_key: str, problems: Problems) -> list[Prompt]:
    """Take the prompt out of each row, noting the rows that lack it; the other columns are the prompt's fields."""
    return [
        Prompt(
            text_field(row, prompt_key, problems),
            row.where,
            {name: value for name, value in row.fields.items() if name != prompt_key},
        )
        for row in rows
    ]


def with_turns(example: Prompt, chat: bool, problems: Problems) -> Prompt:
    """A prompt with its turns as a column of their own, where it passes through a chat template.

    Args:
        example: The prompt; a column of that name, which no data may have, is noted.
        chat: Whether plain text does, too.
        problems: Where it is noted.
    """
    if TURNS in example.fields:
        problems.add(example.where, f"the column {TURNS!r} is made of conversations by us: rename it")
    if isinstance(example.text, str) and not chat:
        return example
    return replace(example, fields={**example.fields, TURNS: as_messages(as_turns(example.text))})


def cut_to_first_words(examples: Sequence[Prompt], words: int, problems: Problems) -> list[Prompt]:
    """Cut each prompt to its first words (split at white space) and keep each result once.

    Returns:
        The prompts in order; how many repeated ones were left out is logged. Conversations are noted as problems.
    """
    unique: dict[str, Prompt] = {}
    for example in examples:
        if not isinstance(example.text, str):
            problems.add(example.where, "first_words cuts plain text, and this prompt is a conversation: unset it")
            continue
        cut = " ".join(example.text.split()[:words])
        unique.setdefault(cut, replace(example, text=cut))
    if len(unique) < len(examples) and not problems.found:
        repeated = len(examples) - len(unique)
        notice(f"{repeated:,} of {len(examples):,} prompts of {problems.source} dropped: repeated after first_words")
    return list(unique.values())


def encode_prompts(
    examples: Sequence[Prompt], encoder: AnswerEncoder, rule: LengthRule, dropped: Dropped
) -> list[EncodedPrompt]:
    """Tokenise prompts.

    Args:
        examples: The texts.
        encoder: How they become token ids; turns end with the words that open the assistant's answer.
        rule: What to do with prompts that leave too little room for ``rule.reserve`` new tokens; truncating keeps BOS
            and the end of the prompt.
        dropped: Counts the rows that are left out.

    Returns:
        The prompts that stay, in order; empty ones are left out, and counted.

    Raises:
        DataError: If no prompt stays, or one is too long and ``rule.too_long`` is ``error``, or the chat template
            refuses one or is missing.
    """
    tokenizer, kept, problems = encoder.tokenizer, list[EncodedPrompt](), Problems(dropped.source)
    encoded, texts = encoder.prompts(
        [example.text for example in examples], [example.where for example in examples], problems
    )
    problems.raise_if_any()
    for example, ids, text in zip(examples, encoded, texts, strict=True):
        if not ids:
            dropped.add("with an empty prompt")
            continue
        if rule.keeps(len(ids), example.where, dropped, problems):
            cut = ids if rule.room is None else keep_end(ids, rule.room, tokenizer.bos_token_id)
            # A reward judges what the policy was shown.
            shown = text if len(cut) == len(ids) else str(tokenizer.decode(cut, skip_special_tokens=True))
            # Of turns that were cut, only the text is left.
            hidden = {TURNS: None} if len(cut) < len(ids) and TURNS in example.fields else {}
            kept.append(EncodedPrompt(cut, shown, len(kept), {**example.fields, **hidden}))
    problems.raise_if_any()
    dropped.report()
    return kept


def collate_prompts(examples: Sequence[EncodedPrompt], columns: Sequence[str] = ()) -> PromptBatch:
    """Make one batch of lists; see `PromptBatch`.

    Args:
        examples: The prompts.
        columns: That the batch has, whether or not one of its own rows does.
    """
    names = dict.fromkeys([*columns, *(name for example in examples for name in example.fields)])
    return {
        "prompt_ids": [example.ids for example in examples],
        "prompts": [example.text for example in examples],
        "index": [example.index for example in examples],
        "fields": {name: [example.fields.get(name) for example in examples] for name in names},
    }
