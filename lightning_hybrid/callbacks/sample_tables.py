"""Sampled responses where people look at them: in the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

_LEAST_WIDTH = 40
_COLUMNS = ("prompt", "response", "score")

Row = Mapping[str, Any]


def log_table(logger: Logger, rows: Sequence[Row], step: int) -> None:
    """Write samples where a logger has a place for texts; the file of a CSV logger has none.

    Args:
        logger: of the Trainer.
        rows: with the keys ``prompt``, ``response`` and ``score``.
        step: the row of the log that they belong to.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("samples", markdown(rows), step)
    elif hasattr(logger, "log_table"):
        logger.log_table(
            "samples", columns=list(_COLUMNS), data=[[row[name] for name in _COLUMNS] for row in rows], step=step
        )


def markdown(rows: Sequence[Row]) -> str:
    """A table as TensorBoard shows it; texts cannot break out of their cells."""
    cells = [f"| {_escaped(row['prompt'])} | {_escaped(row['response'])} | {row['score']:.4g} |" for row in rows]
    return "\n".join(["| prompt | response | score |", "|---|---|---|", *cells])


def terminal_table(rows: Sequence[Row], step: int, width: int | None = None) -> str:
    """A line for each sample, cut to the width; nothing in a text moves the cursor or changes colours.

    Args:
        rows: with the keys ``prompt``, ``response`` and ``score``.
        step: after how many steps they were drawn.
        width: of the lines, in columns; None for the terminal's.
    """
    width = max(_LEAST_WIDTH, width or shutil.get_terminal_size().columns)
    texts = [(f"{row['score']:9.3f}", _one_line(row["prompt"]), _one_line(row["response"])) for row in rows]
    room = width - 9 - 4
    longest = max((columns_of(prompt) for _, prompt, _ in texts), default=0)
    for_prompt = min(max(longest, len("prompt")), room // 2)
    lines = [
        f"{'reward':>9}  {_fit('prompt', for_prompt)}  response",
        *(
            f"{score}  {_fit(prompt, for_prompt)}  {_fit(response, room - for_prompt).rstrip()}"
            for score, prompt, response in texts
        ),
    ]
    return "\n".join([f"samples after step {step:,}", *lines])


def columns_of(text: str) -> int:
    """Columns that a text takes in a terminal: two for wide characters, none for those that combine."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fit(text: str, width: int) -> str:
    """The text in exactly so many columns, with an ellipsis where it was cut."""
    taken = columns_of(text)
    if taken <= width:
        return text + " " * (width - taken)
    kept, used = "", 1
    for character in text:
        used += _columns(character)
        if used > width:
            break
        kept += character
    return f"{kept}…" + " " * (width - columns_of(kept) - 1)


def _one_line(text: str) -> str:
    return "".join("⏎" if character == "\n" else character if character.isprintable() else "·" for character in text)


def _escaped(text: str) -> str:
    for special in "\\|<>*_`[]":
        text = text.replace(special, f"\\{special}")
    return text.replace("\n", "⏎")
