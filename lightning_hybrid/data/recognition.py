"""Which columns mean what: the schemas that rows come in, told apart by the names of their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_hybrid.config.data import SchemaName
from lightning_hybrid.data.checking import say
from lightning_hybrid.errors import DataError

if TYPE_CHECKING:
    from lightning_hybrid.data.reading import Row

Task = Literal["prompts", "instructions", "preferences", "labelled"]
"""What is wanted of the rows: prompts alone, answers to learn, pairs of answers, or answers with a label."""

ADDED_PROMPTS = ("prompt", "question", "instruction", "input")


@dataclass(frozen=True)
class Schema:
    """One way in which rows hold what is wanted.

    Attributes:
        name: What it is called in settings and messages.
        needs: Columns that rows must have; of the names in each tuple, the first that is there.
        may: Columns that count as well, where they are there.
        serves: What can be made of such rows.
    """

    name: SchemaName
    needs: tuple[tuple[str, ...], ...]
    may: tuple[str, ...]
    serves: tuple[Task, ...]

    def fits(self, columns: Collection[str]) -> bool:
        """Whether every column that is needed is there."""
        return all(any(name in columns for name in names) for names in self.needs)

    def used(self, columns: Collection[str]) -> set[str]:
        """Those of the columns that the schema reads."""
        needed = {self.column(index, columns) for index in range(len(self.needs))}
        return {name for name in (*needed, *self.may) if name in columns}

    def column(self, index: int, columns: Collection[str]) -> str:
        """The name under which a needed column is there; the first of its names where it is missing."""
        names = self.needs[index]
        return next((name for name in names if name in columns), names[0])


SCHEMAS: tuple[Schema, ...] = (
    Schema("prompt", (("prompt",),), ("system",), ("prompts",)),
    Schema("prompt_response", (("prompt",), ("response", "completion")), ("system",), ("prompts", "instructions")),
    Schema("messages", (("messages",),), ("system", "tools"), ("prompts", "instructions")),
    Schema("sharegpt", (("conversations",),), ("system", "tools"), ("prompts", "instructions")),
    Schema("alpaca", (("instruction",), ("output",)), ("input", "system"), ("prompts", "instructions")),
    Schema("question_answer", (("question",), ("answer",)), ("system",), ("prompts", "instructions")),
    Schema(
        "chosen_rejected", (("chosen",), ("rejected",)), (*ADDED_PROMPTS, "system", "tools"), ("prompts", "preferences")
    ),
    Schema(
        "sharegpt_pairs",
        (("conversations",), ("chosen",), ("rejected",)),
        ("system", "tools"),
        ("prompts", "preferences"),
    ),
    Schema(
        "two_outputs",
        (("input", "instruction", "prompt"), ("output_1",), ("output_2",), ("label",)),
        ("system",),
        ("prompts", "preferences"),
    ),
    Schema("labelled", (("prompt",), ("completion", "response"), ("label",)), ("system",), ("prompts", "labelled")),
)
BY_NAME = {schema.name: schema for schema in SCHEMAS}


def candidates(task: Task, columns: Collection[str]) -> list[Schema]:
    """The schemas that serve a task and fit the columns; not those that read only a part of what another one reads."""
    fitting = {schema: schema.used(columns) for schema in SCHEMAS if task in schema.serves and schema.fits(columns)}
    return [schema for schema, used in fitting.items() if not any(used < other for other in fitting.values())]


@dataclass
class Recognised:
    """What the rows of one file turned out to be.

    Attributes:
        schema: How they are read.
        columns: That it reads.
        where: Of the first such row.
        rows: Number of them.
        notes: What else was met in them, with the number of rows.
        repeating: Whether answers begin with their prompt, and where this was seen; None before the first prompt.
    """

    schema: Schema
    columns: list[str]
    where: str
    rows: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    repeating: tuple[bool, str] | None = None


class Recogniser:
    """Tells the schema of rows, file by file; all rows of one file have the same.

    Args:
        task: What is wanted of the rows.
        chosen: The schema that all rows have; ``auto`` to tell it by their columns; ``keys`` for none.
    """

    def __init__(self, task: Task, chosen: SchemaName = "auto") -> None:
        self.task = task
        self.chosen = chosen
        self._files: dict[str, Recognised] = {}
        self._met: dict[tuple[str, tuple[str, ...]], Schema | None] = {}

    def schema_of(self, row: Row) -> Schema | None:
        """The schema of a row; None where no schema fits, so that the keys of the settings decide.

        Raises:
            DataError: If several schemas fit, or the row has another one than those before it in its file.
        """
        if self.chosen == "keys":
            return None
        key = (row.file, tuple(row.fields))
        if key not in self._met:
            self._met[key] = self._decide(row)
        if self._met[key] is not None:
            self._files[row.file].rows += 1
        return self._met[key]

    def note(self, row: Row, what: str) -> None:
        """Count something met in a row, for the line that says what was recognised."""
        self._files[row.file].notes[what] += 1

    def repeating(self, row: Row, repeats: bool) -> tuple[bool, str]:
        """Whether the answers of a row's file begin with their prompt, which its first row decides, and where that is.

        Args:
            row: A row with a prompt.
            repeats: Whether its own answers do.
        """
        found = self._files[row.file]
        found.repeating = found.repeating or (repeats, row.where)
        return found.repeating

    def report(self) -> None:
        """Log one line for each file: its rows, their schema and the columns it was told by."""
        for file, found in self._files.items():
            notes = "".join(f"; {count:,} {what}" for what, count in found.notes.items())
            columns = ", ".join(found.columns)
            say(f"{file}: {found.rows:,} rows read as {found.schema.name}, from the columns {columns}{notes}")

    def _decide(self, row: Row) -> Schema | None:
        known = self._files.get(row.file)
        if self.chosen != "auto":
            schema = BY_NAME[self.chosen]
        else:
            fitting = candidates(self.task, row.fields)
            if not fitting:
                return None if known is None else known.schema
            _refuse_ambiguity(row, fitting)
            schema = fitting[0]
        if known is None:
            columns = [name for name in row.fields if not schema.fits(row.fields) or name in schema.used(row.fields)]
            self._files[row.file] = Recognised(schema, columns, row.where)
        elif schema is not known.schema:
            _refuse_mixture(row, schema, known)
        return schema


def schema_problem(task: Task, name: str) -> str:
    """What is wrong with choosing a schema for a task; empty where it serves."""
    serving = ["auto", "keys", *(schema.name for schema in SCHEMAS if task in schema.serves)]
    return "" if name in serving else f"schema must be one of {', '.join(serving)} for {task}, found {name!r}"


def _refuse_ambiguity(row: Row, fitting: list[Schema]) -> None:
    if len(fitting) == 1:
        return
    listed = "\n".join(_line(schema, row, row.where) for schema in fitting)
    choices = " or ".join(schema.name for schema in fitting)
    raise DataError(
        f"{row.file}: its columns fit {len(fitting)} schemas:\n{listed}\n"
        f"set schema (data.schema on the command line) to {choices}; or to keys, with the settings that name columns"
    )


def _refuse_mixture(row: Row, schema: Schema, known: Recognised) -> None:
    first = f"  {known.schema.name}, by {', '.join(known.columns)}: {known.where}"
    raise DataError(
        f"{row.file} mixes rows of two schemas:\n{first}\n{_line(schema, row, row.where)}\n"
        "put them into two files and name both in path; or set schema (data.schema on the command line) to one that "
        "fits all rows"
    )


def _line(schema: Schema, row: Row, where: str) -> str:
    return f"  {schema.name}, by {', '.join(_in_order(schema, row))}: {where}"


def _in_order(schema: Schema, row: Row) -> Iterator[str]:
    used = schema.used(row.fields)
    return (name for name in row.fields if name in used)
