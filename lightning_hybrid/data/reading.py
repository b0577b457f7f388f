"""Files in, rows out: each row remembers the file and line it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_hybrid.data.checking import Problems

Format = Literal["auto", "jsonl", "json", "csv", "lines", "labelled_lines"]
Found = Iterator["tuple[int, dict[str, object] | str]"]
"""What a parser yields: the line (from 1) and either the fields of a row or what is wrong with it."""

_SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".txt": "lines"}
_LABELLED = re.compile(r"([+-]?[0-9]{1,9})[ \t]+(.*)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        fields: The values by name: the keys of a JSON object or the columns of a CSV file, ``text`` for lines,
            ``text`` and ``label`` for labelled lines.
        where: ``file:line``, for messages.

    Example:
        ``Row({"prompt": "2 + 2 =", "response": "4"}, "sums.jsonl:1")``
    """

    fields: dict[str, object]
    where: str


def file_names(path: str | Sequence[str]) -> list[str]:
    """Return the files of a ``path`` setting: one name, or several."""
    return [path] if isinstance(path, str) else [str(name) for name in path]


def read_rows(
    path: str | Sequence[str], format: Format = "auto", encoding: str = "utf-8", problems: Problems | None = None
) -> list[Row]:
    r"""Read every row of one or several files.

    ``jsonl`` has one JSON object a line, ``json`` one list of objects, ``csv`` a header, ``lines`` one text a line,
    ``labelled_lines`` an integer, a space and a text a line. A line ends at ``\n`` and nowhere else; blank lines are
    skipped. Any of them may be gzipped, with a name ending in ``.gz``.

    Args:
        path: File name or names.
        format: One of the above, or ``auto``: by the name's ending (``.txt`` is ``lines``).
        encoding: Of the text in the files; for ``utf-8`` a byte order mark is skipped.
        problems: Where to collect what is wrong. Without it, it is raised here.

    Returns:
        The rows in the order of files and lines.

    Raises:
        DataError: If ``problems`` is not given and a file is missing or empty, cannot be read or decoded, or has a
            line that cannot be parsed; shows all of them.
    """
    names = file_names(path)
    collected = problems if problems is not None else Problems(", ".join(names) or "path")
    if not names:
        collected.add("path", "names no file")
    rows = [row for name in names for row in _read_file(name, format, encoding, collected)]
    if problems is None:
        collected.raise_if_any()
    return rows


def _read_file(name: str, format: str, encoding: str, problems: Problems) -> list[Row]:
    try:
        content = _read_bytes(name)
        parse = _PARSERS[_resolve(name, format)]
        text = _decode(content, encoding)
    except _Unreadable as error:
        problems.add(name, str(error))
        return []
    rows, before = [], len(problems.found)
    for line, found in parse(text):
        if isinstance(found, str):
            problems.add(f"{name}:{line}", found)
        else:
            rows.append(Row(found, f"{name}:{line}"))
    if not rows and len(problems.found) == before:
        problems.add(name, "the file has no rows")
    return rows


class _Unreadable(Exception):
    """Why a file gives no text; becomes one problem."""


def _resolve(name: str, format: str) -> str:
    known = ", ".join(_PARSERS)
    if format != "auto":
        if format not in _PARSERS:
            raise _Unreadable(f"unknown format {format!r}; known are auto, {known}")
        return format
    suffix = os.path.splitext(name.removesuffix(".gz"))[1].lower()
    if suffix not in _SUFFIXES:
        raise _Unreadable(f"the format cannot be told from the ending {suffix!r}; set format to one of {known}")
    return _SUFFIXES[suffix]


def _read_bytes(name: str) -> bytes:
    if not os.path.exists(name):
        raise _Unreadable(f"no such file (looked from {os.getcwd()})")
    if os.path.isdir(name):
        raise _Unreadable("is a folder; name the files in it")
    try:
        with open(name, "rb") as file:
            content = file.read()
        return gzip.decompress(content) if name.endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise _Unreadable(f"cannot be read: {error}") from error


def _decode(content: bytes, encoding: str) -> str:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start : error.start + 1].hex()
        raise _Unreadable(
            f"line {line} is not {encoding}: byte 0x{byte} ({error.reason}); set encoding, for example latin-1"
        ) from error
    except (LookupError, ValueError) as error:
        raise _Unreadable(f"unknown text encoding {encoding!r}: {error}") from error
    if not text.strip():
        raise _Unreadable("the file is empty")
    return text.removeprefix("\ufeff")


def _jsonl(text: str) -> Found:
    for line, content in _numbered(text):
        yield line, _as_object(content)


def _as_object(content: str) -> dict[str, object] | str:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        return f"not valid JSON: {error}"
    return _named(value)


def _named(value: object) -> dict[str, object] | str:
    if isinstance(value, dict):
        return value
    return f"expected an object with named fields, found {type(value).__name__}"


def _json(text: str) -> Found:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield getattr(error, "lineno", 1), f"not valid JSON: {error}; for one object a line set format to jsonl"
        return
    if not isinstance(whole, list):
        yield 1, f"expected a list of objects, found {type(whole).__name__}"
        return
    for line, item in zip(_item_lines(text, len(whole)), whole, strict=True):
        yield line, _named(item)


def _item_lines(text: str, count: int) -> Iterator[int]:
    """Yield the line on which each item of a valid JSON list begins."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, start, end = 1, 0, text.index("[") + 1
    for _ in range(count):
        matched = gap.match(text, end)
        begin = matched.end() if matched else end
        line, start = line + text.count("\n", start, begin), begin
        yield line
        _, end = decoder.raw_decode(text, begin)


def _csv(text: str) -> Found:
    # strict: a quote that is never closed would otherwise swallow the rest of the file into one field
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield line, f"not valid CSV: {error}"
            return
        if values is None:
            return
        if not values:
            continue
        if header is not None:
            yield line, _record(header, values)
        elif len(set(values)) < len(values):
            yield line, f"the header names a column twice: {', '.join(values)}"
            return
        else:
            header = values


def _record(header: list[str], values: list[str]) -> dict[str, object] | str:
    if len(values) != len(header):
        return f"{len(values)} fields, but the header has {len(header)}"
    return dict(zip(header, values, strict=True))


def _lines(text: str) -> Found:
    for line, content in _numbered(text):
        yield line, {"text": content}


def _labelled_lines(text: str) -> Found:
    for line, content in _numbered(text):
        matched = _LABELLED.fullmatch(content)
        if matched is None:
            yield line, f"expected 'label text' with an integer label, found {ascii(content[:40])}"
        else:
            yield line, {"text": matched[2], "label": int(matched[1])}


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    # Only "\n": str.splitlines would also cut at U+2028 or at latin-1's 0x85, which occur inside real sentences.
    for line, content in enumerate(text.split("\n"), start=1):
        stripped = content.strip(" \t\r")
        if stripped:
            yield line, stripped


_PARSERS: dict[str, Callable[[str], Found]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "lines": _lines,
    "labelled_lines": _labelled_lines,
}
