"""Files in, rows out: each row remembers the file and line it came from.

Text files are read here; `lightning_hybrid.data.tables` reads Parquet, Arrow and the data sets of the Hugging Face hub.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.parsing import PARSERS, Parsed

Format = Literal["auto", "jsonl", "json", "csv", "lines", "labelled_lines", "parquet", "arrow"]
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".txt": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TABLES = ("parquet", "arrow", "saved", "hub")
"""Kinds of sources that are no text: two formats, a folder of `Dataset.save_to_disk`, and a name on the hub."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]*[\w-]")
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        fields: The values by name: the keys of a JSON object or the columns of a CSV file, ``text`` for lines,
            ``text`` and ``label`` for labelled lines.
        where: ``file:line``, or ``file:row n`` where rows have no lines, for messages.

    Example:
        ``Row({"prompt": "2 + 2 =", "response": "4"}, "sums.jsonl:1")``
    """

    fields: dict[str, object]
    where: str

    @property
    def file(self) -> str:
        """The file that it was read from."""
        return file_of(self.where)


def file_of(where: str) -> str:
    """The file of a ``file:line``."""
    return where.rpartition(":")[0]


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def file_names(path: Paths) -> list[str]:
    """Return the files of a ``path`` setting: one name, or several."""
    return [os.fspath(name) for name in ([path] if isinstance(path, str | os.PathLike) else path)]


@dataclass(frozen=True)
class Manner:
    """How files are read.

    Attributes:
        format: Of the files; see `read_rows`.
        encoding: Of the text in them.
        split: Of a data set that has several, such as ``train``.
        name: Of the configuration of a data set on the hub that has several.
    """

    format: Format = "auto"
    encoding: str = "utf-8"
    split: str | None = None
    name: str | None = None


def read_rows(
    path: Paths,
    format: Format = "auto",
    encoding: str = "utf-8",
    problems: Problems | None = None,
    *,
    split: str | None = None,
    name: str | None = None,
) -> list[Row]:
    r"""Read every row of one or several files.

    ``jsonl`` has one JSON object a line, ``json`` one list of objects, ``csv`` a header, ``lines`` one text a line,
    ``labelled_lines`` an integer, a space and a text a line. A line ends at ``\n`` and nowhere else; blank lines are
    skipped. Any of them may be gzipped, with a name ending in ``.gz``. ``parquet`` and ``arrow`` (IPC
    files and streams) are tables. A path may also be a folder that `datasets.Dataset.save_to_disk` wrote, or the name
    of a data set on the Hugging Face hub such as ``openai/gsm8k``.

    Args:
        path: File name or names.
        format: One of the above, or ``auto``: by the name's ending (``.txt`` is ``lines``).
        encoding: Of the text in the files; for ``utf-8`` a byte order mark is skipped.
        problems: Where to collect what is wrong. Without it, it is raised here.
        split: Which one of a data set's splits.
        name: Which one of the configurations of a data set on the hub.

    Returns:
        The rows in the order of files and lines.

    Raises:
        DataError: If ``problems`` is not given and a file is missing or empty, cannot be read or decoded, or has a
            line that cannot be parsed; shows all of them.
        ConfigError: If a table is to be read and the library for it is not installed.
    """
    names = file_names(path)
    collected = problems if problems is not None else Problems(", ".join(names) or "path")
    if not names:
        collected.add("path", "names no file")
    manner = Manner(format, encoding, split, name)
    rows = [row for file in names for row in _read_file(file, manner, collected)]
    if problems is None:
        collected.raise_if_any()
    return rows


def _read_file(name: str, manner: Manner, problems: Problems) -> list[Row]:
    before = len(problems.found)
    try:
        kind = kind_of(name, manner.format)
        if kind in TABLES:
            from lightning_hybrid.data.tables import open_table

            rows = [row for _, row in open_table(name, kind, manner).good_rows(problems)]
        else:
            rows = list(_read_text(name, PARSERS[kind], manner.encoding, problems))
    except UnreadableError as error:
        problems.add(name, str(error))
        return []
    if not rows and len(problems.found) == before:
        problems.add(name, "the file has no rows")
    return rows


def _read_text(name: str, parse: Callable[[str], Parsed], encoding: str, problems: Problems) -> Iterator[Row]:
    for line, found in parse(_decode(_read_bytes(name), encoding)):
        if isinstance(found, str):
            problems.add(f"{name}:{line}", found)
        else:
            yield Row(found, f"{name}:{line}")


class UnreadableError(Exception):
    """Why a file gives no rows; becomes one problem."""


def kind_of(name: str, format: str) -> str:
    """Tell how a source is written: one of the formats, or ``saved`` or ``hub``.

    Raises:
        UnreadableError: If it cannot be told, or nothing can be read from there.
    """
    known = ", ".join([*PARSERS, "parquet", "arrow"])
    if format not in ("auto", "parquet", "arrow", *PARSERS):
        raise UnreadableError(f"unknown format {format!r}; known are auto, {known}")
    if os.path.isdir(name):
        if not any(os.path.exists(os.path.join(name, file)) for file in _SAVED):
            raise UnreadableError("is a folder; name the files in it")
        return "saved"
    suffix = os.path.splitext(name.removesuffix(".gz"))[1].lower()
    if format == "auto" and suffix not in _SUFFIXES and _HUB_NAME.fullmatch(name) and not os.path.exists(name):
        return "hub"
    if format == "auto" and suffix not in _SUFFIXES:
        raise UnreadableError(f"the format cannot be told from the ending {suffix!r}; set format to one of {known}")
    if not os.path.exists(name):
        raise UnreadableError(f"no such file (looked from {os.getcwd()})")
    return _SUFFIXES[suffix] if format == "auto" else format


def _read_bytes(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            content = file.read()
        return gzip.decompress(content) if name.endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"cannot be read: {error}") from error


def _decode(content: bytes, encoding: str) -> str:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start : error.start + 1].hex()
        raise UnreadableError(
            f"line {line} is not {encoding}: byte 0x{byte} ({error.reason}); set encoding, for example latin-1"
        ) from error
    except (LookupError, ValueError) as error:
        raise UnreadableError(f"unknown text encoding {encoding!r}: {error}") from error
    if not text.strip():
        raise UnreadableError("the file is empty")
    return text.removeprefix("\ufeff")
