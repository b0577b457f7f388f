"""Text to the fields of rows, or to what is wrong with them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial

Fields = dict[str, object]
Parsed = Iterator[tuple[int, Fields | str]]
"""What a parser yields: the line (from 1) and either the fields of a row or what is wrong with it."""

_LABELLED = re.compile(r"([+-]?[0-9]{1,9})[ \t]+(.*)", re.DOTALL)


def _as_object(content: str) -> Fields | str:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        return f"not valid JSON: {error}"
    return _named(value)


def _named(value: object) -> Fields | str:
    if isinstance(value, dict):
        return value
    return f"expected an object with named fields, found {type(value).__name__}"


def _json(text: str) -> Parsed:
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


def _csv(text: str) -> Parsed:
    # A field may be as long as the file; the module's own limit is 128 KiB.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # strict: a quote that is never closed would otherwise swallow the rest of the file into one field
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not valid CSV: {error}"
            return
        if values and header is not None:
            yield line, _record(header, values)
        elif len(set(values)) < len(values):
            yield line, f"the header names a column twice: {', '.join(values)}"
            return
        elif values:
            header = values


def _record(header: list[str], values: list[str]) -> Fields | str:
    if len(values) != len(header):
        return f"{len(values)} fields, but the header has {len(header)}"
    return dict(zip(header, values, strict=True))


def _as_text(content: str) -> Fields | str:
    return {"text": content}


def _as_labelled_text(content: str) -> Fields | str:
    matched = _LABELLED.fullmatch(content)
    if matched is None:
        return f"expected 'label text' with an integer label, found {ascii(content[:40])}"
    return {"text": matched[2], "label": int(matched[1])}


LINE_FORMATS: dict[str, Callable[[str], Fields | str]] = {
    "jsonl": _as_object,
    "lines": _as_text,
    "labelled_lines": _as_labelled_text,
}
"""Formats with one row a line: what makes the fields of a line, or says what is wrong with it."""


def _by_line(parse: Callable[[str], Fields | str], text: str) -> Parsed:
    for line, content in _numbered(text):
        yield line, parse(content)


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    # Only "\n": str.splitlines would also cut at U+2028 or at latin-1's 0x85, which occur inside real sentences.
    for line, content in enumerate(text.split("\n"), start=1):
        stripped = content.strip(" \t\r")
        if stripped:
            yield line, stripped


PARSERS: dict[str, Callable[[str], Parsed]] = {
    "jsonl": partial(_by_line, _as_object),
    "json": _json,
    "csv": _csv,
    "lines": partial(_by_line, _as_text),
    "labelled_lines": partial(_by_line, _as_labelled_text),
}
