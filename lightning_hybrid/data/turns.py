"""Turns of a conversation, as data sets write them: who says what, under names that differ."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.conversation import Role, Text, Turn, leading_system
from lightning_hybrid.data.fields import surrogate_problem, text_field

if TYPE_CHECKING:
    from lightning_hybrid.data.reading import Row

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}

NO_TOOLS = ("[]", "{}", "null")
CALLS = ("tool_calls", "function_call")


def turns_field(row: Row, key: str, problems: Problems) -> tuple[Turn, ...]:
    """Return the turns under ``key``: a list of objects, or a single one; what is wrong with them is noted.

    An object says who speaks as ``role`` or ``from`` and what as ``content`` or ``value``. A content may be a list of
    parts, of which each is text.
    """
    items = _items(row.fields.get(key))
    if not items:
        wanted = "a list of turns, or columns of equal length"
        problems.add(row.where, f"{key!r} must be {wanted}, found {reprlib.repr(row.fields.get(key))}")
        return ()
    found: list[Turn] = []
    for number, item in enumerate(items, start=1):
        turn = _turn(item)
        if isinstance(turn, str):
            problems.add(row.where, f"turn {number} of {key!r}: {turn}")
        else:
            found.append(turn)
    return tuple(found) if len(found) == len(items) else ()


def text_or_turns(row: Row, key: str, problems: Problems) -> Text:
    """Return the text or the turns under ``key``, noting what is neither."""
    if isinstance(row.fields.get(key), list | tuple):
        return turns_field(row, key, problems)
    return text_field(row, key, problems)


def with_system(row: Row, text: Text, columns: Collection[str], problems: Problems) -> Text:
    """Put what stands under ``system`` and ``tools``, where ``columns`` counts them, in front as what the system says.

    Tools are quoted as they are written: a chat template gets no list of them.
    """
    parts = [_said_first(row, key, problems) for key in ("system", "tools") if key in columns]
    parts = [part for part in parts if part]
    if not parts:
        return text
    if not isinstance(text, str) and text and text[0].role == "system":
        said = text[0].content  # which the column may only say again
        parts, text = [said, *(part for part in parts if part != said)], text[1:]
    return leading_system(text, "\n\n".join(parts))


def quotes_tools(row: Row, columns: Collection[str]) -> bool:
    """Whether :func:`with_system` puts tools of a row into its system turn."""
    return "tools" in columns and bool(_said_first(row, "tools", Problems(row.where)))


def _said_first(row: Row, key: str, problems: Problems) -> str:
    value = row.fields.get(key)
    if value is None:
        return ""
    listed = key == "tools" and isinstance(value, list | dict)
    said = json.dumps(value, ensure_ascii=False) if listed else text_field(row, key, problems)
    return "" if not said.strip() or (key == "tools" and said.strip() in NO_TOOLS) else said


def _items(value: object) -> Sequence[object]:
    """The turns of a list, of a single one, or of columns of equal length, as Arrow files may hold them."""
    if isinstance(value, Mapping):
        columns = list(value.values())
        if not columns or not all(isinstance(column, list) for column in columns):
            return [value]
        if len({len(column) for column in columns}) > 1:
            return []
        return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    return value if isinstance(value, list | tuple) else []


def _turn(item: object) -> Turn | str:
    """A turn, or what is wrong with it."""
    if not isinstance(item, Mapping):
        return f"expected an object with role and content, found {reprlib.repr(item)}"
    speaker = item.get("role", item.get("from"))
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        return f"must say who speaks, as 'role' or 'from': {', '.join(ROLES)}; found {reprlib.repr(speaker)}"
    calls = next((name for name in CALLS if item.get(name) and item[name] not in NO_TOOLS), None)
    if calls is not None:
        return f"{calls!r} would be lost, as a turn is text: write the call into its content"
    content = _content(item.get("content", item.get("value")))
    if content is None:
        return f"'content' or 'value' must be text, found {reprlib.repr(dict(item))}"
    return surrogate_problem(content) or Turn(role, content)


def _content(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) and parts else None
