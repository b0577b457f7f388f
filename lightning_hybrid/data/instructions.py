"""Instructions: a prompt and the response to learn, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hybrid.data.checking import Dropped, Problems
from lightning_hybrid.data.conversation import Text, Turn, identity_of
from lightning_hybrid.data.encoding import NOTHING, AnswerEncoder, EncodedText
from lightning_hybrid.data.fields import text_field
from lightning_hybrid.data.tokenizing import LengthRule, pad_batch, pad_masks

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_hybrid.data.reading import Row


@dataclass(frozen=True)
class Instruction:
    """A prompt (empty where the whole text is the response), its response, and where they were read."""

    prompt: Text
    response: str
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls."""
        return f"{identity_of(self.prompt)}\n{self.response}"


@dataclass(frozen=True)
class Dialogue:
    """A conversation with one or several answers to learn, and where it was read."""

    turns: tuple[Turn, ...]
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls."""
        return identity_of(self.turns)


def read_instructions(
    rows: Sequence[Row], prompt_key: str | None, response_key: str, problems: Problems
) -> list[Instruction]:
    """Take prompt and response out of each row, noting the rows that lack them."""
    return [
        Instruction(
            prompt="" if prompt_key is None else text_field(row, prompt_key, problems),
            response=text_field(row, response_key, problems),
            where=row.where,
        )
        for row in rows
    ]


def encode_instructions(
    examples: Sequence[Instruction | Dialogue], encoder: AnswerEncoder, rule: LengthRule, dropped: Dropped
) -> list[EncodedText]:
    """Tokenise prompts with their responses, and conversations.

    Args:
        examples: The texts.
        encoder: How they become token ids.
        rule: What to do with rows of too many tokens; truncating cuts the end of the response, and its EOS.
        dropped: Counts the rows that are left out.

    Returns:
        The rows that stay, in order.

    Raises:
        DataError: If no row stays, or a row is too long and ``rule.too_long`` is ``error``, or the chat template
            refuses one or is missing.
    """
    kept, problems = [], Problems(dropped.source)
    for example, whole in zip(examples, _encode(examples, encoder, problems), strict=True):
        if not whole.ids:
            dropped.add("with an empty response")
            continue
        if not rule.keeps(len(whole), example.where, dropped, problems):
            continue
        row = whole.begin(rule.room)
        if not any(row.learned):
            dropped.add(f"with a prompt that leaves no token of response within max_length {rule.max_length}")
            continue
        kept.append(row)
    problems.raise_if_any()
    dropped.report()
    return kept


def _encode(
    examples: Sequence[Instruction | Dialogue], encoder: AnswerEncoder, problems: Problems
) -> list[EncodedText]:
    """Token ids of every example; refusals by the template are raised, all at once, before any row is judged."""
    singles = [(i, example) for i, example in enumerate(examples) if isinstance(example, Instruction)]
    dialogues = [(i, example) for i, example in enumerate(examples) if isinstance(example, Dialogue)]
    asked = [(example.prompt, example.response) for _, example in singles]
    encoded = dict.fromkeys(range(len(examples)), NOTHING)
    answers = encoder.answers(asked, [example.where for _, example in singles], problems)
    encoded |= {i: answer for (i, _), answer in zip(singles, answers, strict=True)}
    turns = encoder.dialogues([x.turns for _, x in dialogues], [x.where for _, x in dialogues], problems)
    encoded |= {i: dialogue for (i, _), dialogue in zip(dialogues, turns, strict=True)}
    problems.raise_if_any()
    return list(encoded.values())


def collate_instructions(examples: Sequence[EncodedText], fill: int) -> dict[str, Tensor]:
    """Make one batch, padded on the right with the id ``fill``.

    Returns:
        ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T], True on tokens, and ``loss_mask`` Bool[B, T], True on
        the tokens of responses and their EOS.
    """
    input_ids, attention_mask = pad_batch([example.ids for example in examples], fill)
    loss_mask = pad_masks([example.learned for example in examples])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
