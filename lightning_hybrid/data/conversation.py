"""Turns of a conversation: what is said, and by whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """One thing said.

    Attributes:
        role: Who says it.
        content: Its text.
    """

    role: Role
    content: str


# Plain text, or turns that a chat template makes text of.
Text = str | tuple[Turn, ...]


def identity_of(text: Text) -> str:
    """What tells a text from others: itself, or who says what in each turn."""
    return text if isinstance(text, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in text)


def leading_system(text: Text, system: str) -> Text:
    """Put what the system says in front; plain text becomes the user's turn then, and an empty ``system`` does nothing.

    Example:
        ``leading_system("2 + 2 =", "Be brief.") == (Turn("system", "Be brief."), Turn("user", "2 + 2 ="))``
    """
    if not system.strip():
        return text
    turns = (Turn("user", text),) if isinstance(text, str) else text
    return (Turn("system", system), *turns)
