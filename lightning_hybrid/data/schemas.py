"""From rows to examples, whatever the schema of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.conversation import Text, Turn
from lightning_hybrid.data.fields import label_field, number_field, text_field
from lightning_hybrid.data.instructions import Dialogue, Instruction
from lightning_hybrid.data.pairs import is_transcript, part_texts, part_turns
from lightning_hybrid.data.preferences import LabelledResponse, Preference
from lightning_hybrid.data.prompts import Prompt
from lightning_hybrid.data.reading import Row
from lightning_hybrid.data.recognition import ADDED_PROMPTS, Recogniser, Schema
from lightning_hybrid.data.turns import quotes_tools, text_or_turns, turns_field, with_system

Example = TypeVar("Example")
ANSWERS = {"response", "completion", "answer", "output", "output_1", "output_2", "label"}
ByKeys = Callable[[Sequence[Row]], Sequence[Example]]
"""Reads rows by the names that the settings give to columns."""


def prompts_of(
    rows: Sequence[Row], recogniser: Recogniser, by_keys: ByKeys[Prompt], problems: Problems
) -> list[Prompt]:
    """Take the prompt out of each row; the columns that did not make it are its fields.

    Args:
        rows: What was read.
        recogniser: Knows their schema.
        by_keys: Reads rows of no schema.
        problems: Where problems are noted.

    Raises:
        DataError: If the schema of a row is ambiguous, or not that of its file.
    """

    def convert(row: Row, schema: Schema) -> Prompt:
        used = schema.used(row.fields) - ANSWERS
        fields = {name: value for name, value in row.fields.items() if name not in used}
        return Prompt(_prompt_text(row, schema, recogniser, problems), row.where, fields)

    return _examples(rows, recogniser, by_keys, convert)


def instructions_of(
    rows: Sequence[Row], recogniser: Recogniser, by_keys: ByKeys[Instruction], problems: Problems
) -> list[Instruction | Dialogue]:
    """Take prompt and answer, or the whole conversation, out of each row; arguments as of `prompts_of`."""

    def convert(row: Row, schema: Schema) -> Instruction | Dialogue:
        if schema.name in ("messages", "sharegpt"):
            said = with_system(row, turns_field(row, schema.column(0, row.fields), problems), schema.may, problems)
            return _dialogue(() if isinstance(said, str) else said, row)
        prompt = _prompt_text(row, schema, recogniser, problems)
        answer = text_or_turns(row, schema.column(1, row.fields), problems)
        if isinstance(answer, str):
            return Instruction(prompt, answer, row.where)
        turns = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
        return _dialogue((*turns, *answer), row)

    def _dialogue(turns: tuple[Turn, ...], row: Row) -> Dialogue:
        if turns and all(turn.role != "assistant" for turn in turns):
            problems.add(row.where, "no turn is the assistant's, so there is nothing to learn")
        return Dialogue(turns, row.where)

    return _examples(rows, recogniser, by_keys, convert)


def preferences_of(
    rows: Sequence[Row],
    recogniser: Recogniser,
    by_keys: ByKeys[Preference],
    margin_key: str | None,
    problems: Problems,
) -> list[Preference]:
    """Take the prompt and the two answers out of each row; arguments as of `prompts_of`.

    Args:
        margin_key: Name of the number by which the better answer leads; None for none.
    """

    def convert(row: Row, schema: Schema) -> Preference:
        prompt, chosen, rejected = _pair(row, schema, recogniser, problems)
        margin = None if margin_key is None else number_field(row, margin_key, problems)
        return Preference(prompt, chosen, rejected, margin, row.where)

    return _examples(rows, recogniser, by_keys, convert)


def labelled_of(
    rows: Sequence[Row], recogniser: Recogniser, by_keys: ByKeys[LabelledResponse], problems: Problems
) -> list[LabelledResponse]:
    """Take prompt, answer and label out of each row; arguments as of `prompts_of`."""

    def convert(row: Row, schema: Schema) -> LabelledResponse:
        prompt = _prompt_text(row, schema, recogniser, problems)
        answer = _one_answer(row, schema.column(1, row.fields), problems)
        return LabelledResponse(prompt, answer, label_field(row, "label", problems), row.where)

    return _examples(rows, recogniser, by_keys, convert)


def _examples(
    rows: Sequence[Row],
    recogniser: Recogniser,
    by_keys: Callable[[Sequence[Row]], Sequence[Example]],
    convert: Callable[[Row, Schema], Example],
) -> list[Example]:
    if recogniser.chosen == "keys":
        return [*by_keys(rows)]
    found: list[Example] = []
    for row in rows:
        schema = recogniser.schema_of(row)
        if schema is not None and quotes_tools(row, schema.may):
            recogniser.note(row, "whose tools are quoted in the system turn (the chat template gets no list of them)")
        found += by_keys([row]) if schema is None else [convert(row, schema)]
    return found


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _prompt_text(row: Row, schema: Schema, recogniser: Recogniser, problems: Problems) -> Text:
    if schema.name in ("chosen_rejected", "sharegpt_pairs"):
        return _pair(row, schema, recogniser, problems)[0]
    key = schema.column(0, row.fields)
    if schema.name in ("messages", "sharegpt"):
        asked = _before_the_last_answer(row, turns_field(row, key, problems), problems)
        return with_system(row, asked, schema.may, problems)
    if schema.name == "alpaca":
        return with_system(row, _with_input(row, problems), schema.may, problems)
    return with_system(row, text_or_turns(row, key, problems), schema.may, problems)


def _before_the_last_answer(row: Row, turns: tuple[Turn, ...], problems: Problems) -> tuple[Turn, ...]:
    asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
    if turns and all(turn.role != "user" for turn in asked):
        problems.add(row.where, "no turn of the user stands before the last answer, so there is no prompt")
    return asked


def _with_input(row: Row, problems: Problems) -> str:
    """The instruction of an Alpaca row, and under an empty line what it is about."""
    instruction = text_field(row, "instruction", problems)
    about = "" if row.fields.get("input") is None else text_field(row, "input", problems)
    return f"{instruction}\n\n{about}" if about.strip() else instruction


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _pair(row: Row, schema: Schema, recogniser: Recogniser, problems: Problems) -> tuple[Text, str, str]:
    """The prompt, the better and the worse answer."""
    if schema.name == "two_outputs":
        prompt = with_system(row, text_or_turns(row, schema.column(0, row.fields), problems), schema.may, problems)
        return prompt, *_better_first(row, problems)
    if schema.name == "sharegpt_pairs":
        prompt = with_system(row, turns_field(row, "conversations", problems), schema.may, problems)
        return prompt, _one_answer(row, "chosen", problems), _one_answer(row, "rejected", problems)
    given = _given_prompt(row, schema, problems)
    if all(isinstance(row.fields.get(key), list | tuple) for key in ("chosen", "rejected")):
        return _pair_of_conversations(row, schema, given, problems)
    chosen, rejected = text_field(row, "chosen", problems), text_field(row, "rejected", problems)
    if given:
        return given, *_without_repeated_prompt(row, given, (chosen, rejected), recogniser, problems)
    prompt, chosen, rejected = part_texts(chosen, rejected)
    kind = "transcripts parted at their last shared 'Assistant:'" if is_transcript(prompt) else "of no named prompt"
    recogniser.note(row, kind)
    return with_system(row, prompt, schema.may, problems) if prompt else prompt, chosen, rejected


def _better_first(row: Row, problems: Problems) -> tuple[str, str]:
    label = row.fields.get("label")
    one, two = (text_field(row, key, problems) for key in ("output_1", "output_2"))
    if label not in (1, 2, "1", "2") or isinstance(label, bool):
        problems.add(row.where, f"'label' must be 1 (output_1 is better) or 2 (output_2), found {label!r}")
    return (one, two) if label in (1, "1") else (two, one)


def _given_prompt(row: Row, schema: Schema, problems: Problems) -> Text:
    """The prompt that has a column of its own; empty where none has."""
    if row.fields.get("instruction") is not None and row.fields.get("prompt") is None:
        return with_system(row, _with_input(row, problems), schema.may, problems)
    key = next((name for name in ADDED_PROMPTS if row.fields.get(name) is not None), None)
    return "" if key is None else with_system(row, text_or_turns(row, key, problems), schema.may, problems)


def _without_repeated_prompt(
    row: Row, prompt: Text, answers: tuple[str, str], recogniser: Recogniser, problems: Problems
) -> tuple[str, str]:
    """Take the prompt off the front of both answers, where those of the whole file repeat it.

    An answer may begin with the words of its prompt by chance, as "Hi" is answered by "Hi there": that the first row of
    the file repeats its prompt, in both answers, tells what the file means.
    """
    asked = prompt if isinstance(prompt, str) else prompt[-1].content
    if not asked.strip():
        return answers
    repeats = all(_continues(asked, answer) for answer in answers)
    in_file, first = recogniser.repeating(row, repeats)
    if in_file and not repeats:
        problems.add(
            row.where,
            f"its answers do not both begin with its prompt, as those of {first} do: take the prompt off those, or set "
            "schema to keys, which leaves answers as they are, with prompt_key for a prompt that they do not repeat",
        )
    elif repeats:
        recogniser.note(row, f"whose answers began with the prompt, {'taken off' if in_file else 'left as they are'}")
    return (answers[0][len(asked) :], answers[1][len(asked) :]) if in_file and repeats else answers


def _continues(asked: str, answer: str) -> bool:
    """Whether an answer begins with the prompt, and not in the middle of a word."""
    return answer.startswith(asked) and not (asked[-1].isalnum() and answer[len(asked) : len(asked) + 1].isalnum())


def _pair_of_conversations(row: Row, schema: Schema, given: Text, problems: Problems) -> tuple[Text, str, str]:
    """The prompt is what both conversations share, or the one of its own column, where they have an answer only."""
    sides = (turns_field(row, "chosen", problems), turns_field(row, "rejected", problems))
    prompt, chosen, rejected = part_turns(*sides)
    if any(len(rest) != 1 or rest[0].role != "assistant" for rest in (chosen, rejected)):
        problems.add(row.where, "'chosen' and 'rejected' must differ in their last turn only, the assistant's answer")
        return "", "", ""
    text = with_system(row, prompt, schema.may, problems) if prompt else given
    return text, chosen[0].content, rejected[0].content


def _one_answer(row: Row, key: str, problems: Problems) -> str:
    """The text of an answer that is written as text, as a turn, or as a list of one turn."""
    if isinstance(row.fields.get(key), str):
        return text_field(row, key, problems)
    turns = turns_field(row, key, problems)
    if turns and (len(turns) != 1 or turns[0].role != "assistant"):
        problems.add(row.where, f"{key!r} must be one answer of the assistant, found {len(turns)} turns")
        return ""
    return turns[0].content if turns else ""
