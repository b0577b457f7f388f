"""Rows that carry the same id."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence

from lightning_hybrid.data.checking import notice
from lightning_hybrid.data.reading import Row

NONE = 0


class Ids:
    """The ids of a file's rows, as 8 bytes each; a warning says how many occur again.

    Args:
        file: Whose rows they are.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._hashes = array("Q")

    def add(self, row: Row) -> None:
        """Take in the next row, which may have a column ``id``."""
        value = row.fields.get("id")
        known = isinstance(value, str | int) and value != ""
        digest = hashlib.blake2b(str(value).encode(errors="replace"), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest) or 1 if known else NONE)

    def report(self, where: Callable[[int], str]) -> None:
        """Warn where ids occur again.

        Args:
            where: Gives ``file:line`` of the row with a number, counted from 0.
        """
        import numpy

        hashes = numpy.frombuffer(self._hashes, dtype=numpy.uint64) if self._hashes else numpy.zeros(0, numpy.uint64)
        order = numpy.argsort(hashes, kind="stable")
        ranked = hashes[order]
        again = numpy.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != NONE))
        if len(again):
            first, second = int(order[again[0]]), int(order[again[0] + 1])
            notice(
                f"{len(again):,} of {len(self._hashes):,} rows of {self.file} have the id of another row, such as "
                f"{where(first)} and {where(second)}; all of them are used"
            )


def report_ids(rows: Sequence[Row]) -> None:
    """Warn where rows of one file have the same id."""
    by_file: dict[str, list[Row]] = {}
    for row in rows:
        by_file.setdefault(row.file, []).append(row)
    for file, own in by_file.items():
        ids = Ids(file)
        for row in own:
            ids.add(row)
        ids.report([row.where for row in own].__getitem__)
