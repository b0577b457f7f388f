"""Rows of tables: Parquet and Arrow files."""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.fingerprint import refuse_change, stamp
from lightning_hybrid.data.reading import Manner, Row, UnreadableError
from lightning_hybrid.errors import ConfigError

OPEN_GROUPS = 4  # row groups of a Parquet file held at once; rows are shuffled over as many


class RowSource(Protocol):
    """Rows that are read when they are asked for.

    Attributes:
        name: As it stands in ``path``.
        blocks: Numbers of rows that are read together, in order; None where any row is at hand at once.
    """

    name: str
    blocks: Sequence[int] | None

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> Row:
        """One row, anew from the file."""
        ...

    def good_rows(self, problems: Problems) -> Iterator[tuple[int, Row]]:
        """All rows in order, each with its index; those that cannot be parsed are noted as problems."""
        ...


def open_table(name: str, kind: str, manner: Manner) -> RowSource:
    """Open a source of the kind ``parquet``, ``arrow``, ``saved`` or ``hub``.

    Raises:
        UnreadableError: If it cannot be read.
        ConfigError: If the library for it is not installed.
    """
    from lightning_hybrid.data.hub import open_hub, open_saved

    try:
        if kind == "parquet":
            return ParquetRows(name)
        if kind == "arrow":
            return _TableRows(name, _open_arrow(name))
        return open_saved(name, manner) if kind == "saved" else open_hub(name, manner)
    except ImportError as error:
        library = "pyarrow" if kind in ("parquet", "arrow") else "datasets"
        remedy = 'pip install "lightning-hybrid[data]"'
        raise ConfigError(f"{name}: reading it needs the library {library}: {remedy} ({error})") from error


class ParquetRows:
    """Rows of a Parquet file, of which a few row groups are held at a time.

    Args:
        name: Of the file.

    Raises:
        UnreadableError: If it is no Parquet file.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._stamp = stamp(name)
        self._file = self._open()
        metadata = self._file.metadata
        sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self.blocks: Sequence[int] | None = sizes
        self._sizes, self._ends = sizes, list(accumulate(sizes))
        self._process = os.getpid()
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """One row."""
        group = bisect.bisect_right(self._ends, index)
        table = self._group(group)
        inside = index - (self._ends[group] - self._sizes[group])
        return Row(table.slice(inside, 1).to_pylist()[0], f"{self.name}:row {index + 1}")

    def good_rows(self, problems: Problems) -> Iterator[tuple[int, Row]]:
        """All rows in order."""
        index = 0
        for batch in self._file.iter_batches(use_threads=False):
            for fields in batch.to_pylist():
                yield index, Row(fields, f"{self.name}:row {index + 1}")
                index += 1

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: the other process opens its own."""
        return {**self.__dict__, "_file": None, "_process": None, "_groups": OrderedDict()}

    def _open(self) -> Any:
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(self.name)
        except (OSError, pyarrow.ArrowException) as error:
            raise UnreadableError(f"cannot be read as Parquet: {error}") from error

    def _group(self, group: int) -> Any:
        if self._process != os.getpid():  # a file that two processes share has one position for both
            self._file, self._process, self._groups = self._open(), os.getpid(), OrderedDict()
        if group not in self._groups:
            refuse_change(self.name, self._stamp)
            self._groups[group] = self._file.read_row_group(group, use_threads=False)
            if len(self._groups) > OPEN_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


class _TableRows:
    """Rows of a table that is mapped into memory, so that any row is at hand and none is held."""

    blocks: Sequence[int] | None = None

    def __init__(self, name: str, table: Any) -> None:
        self.name = name
        self._stamp = stamp(name)
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Row:
        refuse_change(self.name, self._stamp)
        return Row(self._table.slice(index, 1).to_pylist()[0], f"{self.name}:row {index + 1}")

    def good_rows(self, problems: Problems) -> Iterator[tuple[int, Row]]:
        """All rows in order."""
        index = 0
        for batch in self._table.to_batches(max_chunksize=1024):
            for fields in batch.to_pylist():
                yield index, Row(fields, f"{self.name}:row {index + 1}")
                index += 1


def _open_arrow(name: str) -> Any:
    import pyarrow
    from pyarrow import ipc

    try:
        try:
            return ipc.open_file(pyarrow.memory_map(name)).read_all()
        except pyarrow.ArrowInvalid:  # the other of the two forms, without an index at its end
            return ipc.open_stream(pyarrow.memory_map(name)).read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise UnreadableError(f"cannot be read as an Arrow file or stream: {error}") from error
