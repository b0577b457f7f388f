"""Rows of text files that are found again by where their lines begin, so that none is held in memory."""

from __future__ import annotations

import codecs
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.fingerprint import refuse_change, stamp
from lightning_hybrid.data.parsing import LINE_FORMATS
from lightning_hybrid.data.reading import Manner, Row, UnreadableError
from lightning_hybrid.errors import DataError

BLANK = b" \t\r\n"
BOM = b"\xef\xbb\xbf"


class LineRows:
    """Rows of a file with one row a line: JSON objects, texts, or labelled texts.

    Opening it reads the file once and keeps, for each row, the place where it begins, its bytes and its line: 20 bytes.

    Args:
        name: Of the file.
        kind: Its format.
        manner: Gives the encoding.

    Raises:
        UnreadableError: If the file cannot be streamed or has no rows.
    """

    blocks: Sequence[int] | None = None

    def __init__(self, name: str, kind: str, manner: Manner) -> None:
        self.name = name
        self.encoding = _known_encoding(manner.encoding)
        self._parse = _parser(name, kind, self.encoding)
        self._stamp = stamp(name)
        self._begins, self._lengths, self._lines = array("Q"), array("I"), array("Q")
        self._file: int | None = None
        self._process: int | None = None
        self._index()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._begins)

    def __getitem__(self, index: int) -> Row:
        """One row, anew from the file.

        Raises:
            DataError: If the file was changed since it was opened.
        """
        found = self._read(index)
        if isinstance(found, str):
            raise DataError(f"{self._where(index)}: {found}")
        return Row(found, self._where(index))

    def good_rows(self, problems: Problems) -> Iterator[tuple[int, Row]]:
        """All rows in order, each with its index; those that cannot be parsed are noted as problems."""
        for index in range(len(self)):
            found = self._read(index)
            if isinstance(found, str):
                problems.add(self._where(index), found)
            else:
                yield index, Row(found, self._where(index))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: the other process opens its own."""
        return {**self.__dict__, "_file": None, "_process": None}

    def _index(self) -> None:
        begin = 0
        try:
            with open(self.name, "rb") as file:
                for number, line in enumerate(file, start=1):
                    skipped = len(BOM) if number == 1 and line.startswith(BOM) and self.encoding == "utf-8" else 0
                    if line[skipped:].strip(BLANK):
                        self._begins.append(begin + skipped)
                        self._lengths.append(len(line) - skipped)
                        self._lines.append(number)
                    begin += len(line)
        except (OSError, OverflowError) as error:
            raise UnreadableError(f"cannot be read: {error}") from error
        if not len(self):
            raise UnreadableError("the file is empty")

    def _where(self, index: int) -> str:
        return f"{self.name}:{self._lines[index]}"

    def _read(self, index: int) -> dict[str, object] | str:
        """The fields of a row, or what is wrong with it."""
        content = os.pread(self._descriptor(), self._lengths[index], self._begins[index])
        try:
            text = content.decode(self.encoding)
        except UnicodeDecodeError as error:
            return f"is not {self.encoding}: byte 0x{content[error.start]:02x} ({error.reason}); set encoding"
        return self._parse(text.strip(" \t\r\n"))

    def _descriptor(self) -> int:
        """The file, open in this process."""
        if self._file is None or self._process != os.getpid():
            self._file, self._process = os.open(self.name, os.O_RDONLY), os.getpid()
        refuse_change(self.name, self._stamp, self._file)
        return self._file

    def __del__(self) -> None:
        """Close the file, where this process opened it."""
        opened = getattr(self, "_file", None)
        if opened is not None and self._process == os.getpid():
            os.close(opened)


def _known_encoding(encoding: str) -> str:
    """``utf-8`` under whatever name, also where it is to begin with a byte order mark; others as they are."""
    try:
        name = codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:
        raise UnreadableError(f"unknown text encoding {encoding!r}: {error}") from error
    return "utf-8" if name in ("utf-8", "utf-8-sig") else encoding


def _parser(name: str, kind: str, encoding: str) -> Callable[[str], dict[str, object] | str]:
    streamed = ", ".join([*LINE_FORMATS, "parquet", "arrow"])
    if kind not in LINE_FORMATS:
        raise UnreadableError(f"{kind} cannot be streamed, only {streamed}: turn streaming off, or convert the file")
    if name.endswith(".gz"):
        raise UnreadableError("a gzipped file cannot be streamed: unpack it, or turn streaming off")
    if "\n".encode(encoding) != b"\n":
        raise UnreadableError(f"{encoding} cannot be streamed, as its lines do not end with one byte: convert to utf-8")
    return LINE_FORMATS[kind]
