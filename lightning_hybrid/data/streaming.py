"""Rows that are read and tokenised when their batch is made, for files larger than memory.

One pass before training decides which rows stay and how long they are, and keeps 12 bytes of each that stays. So a
stream has a length, any row of it can be had, and shuffling, sharing out over ranks and workers, and going on in the
middle of an epoch are those of data that is held in memory.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset

from lightning_hybrid.data.checking import Dropped, Problems, Tally
from lightning_hybrid.data.fingerprint import Files, digest_of_rows
from lightning_hybrid.data.ids import Ids
from lightning_hybrid.data.lines import LineRows
from lightning_hybrid.data.reading import TABLES, Manner, Row, UnreadableError, kind_of
from lightning_hybrid.data.splitting import Identified, is_held_out
from lightning_hybrid.data.tables import RowSource, open_table

Example = TypeVar("Example", bound=Identified)
BITE = 512  # rows that are read and tokenised together in the pass before training


def open_source(name: str, manner: Manner) -> RowSource:
    """Open rows that are read when they are asked for.

    Raises:
        UnreadableError: If the source cannot be read, or not in this way.
    """
    kind = kind_of(name, manner.format)
    source: RowSource = open_table(name, kind, manner) if kind in TABLES else LineRows(name, kind, manner)
    if not len(source):
        raise UnreadableError("the file has no rows")
    return source


@dataclass
class Kept:
    """The rows of a source that stay.

    Attributes:
        rows: Index of each in its source.
        lengths: Tokens of each.
    """

    rows: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("I"))

    def add(self, row: int, length: int) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.lengths.append(length)


class StreamedDataset(Dataset[Any]):
    """The rows of one source that stay, read and tokenised when they are asked for.

    Args:
        source: The rows.
        kept: Which of them, and how long they are.
        make: Makes an item of a row and of its index here.
    """

    def __init__(self, source: RowSource, kept: Kept, make: Callable[[Row, int], Any]) -> None:
        self.source = source
        self.kept = kept
        self._make = make

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each item."""
        return self.kept.lengths

    @property
    def blocks(self) -> list[int]:
        """Numbers of items that lie together; all of them where any row is at hand at once."""
        if self.source.blocks is None:
            return [len(self)]
        ends = [bisect.bisect_left(self.kept.rows, end) for end in accumulate(self.source.blocks)]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False) if end > begin]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.kept.rows)

    def __getitem__(self, index: int) -> Any:
        """One item, from its file.

        Raises:
            DataError: If the file was changed since training began.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._make(self.source[self.kept.rows[index]], index)


@dataclass
class Survey(Generic[Example]):
    """The pass before training.

    Attributes:
        read: Makes examples of rows, noting problems.
        encode: Makes items of examples; leaves out those that are dropped, counting them in the tally.
        make: Makes the item of a row that stays, of its index in the stream.
        problems: Where rows that cannot be used are noted; nothing is tokenised any more after the first.
        files: What was read: see `Files.read`.
        dropped: The rows that are left out, by reason.
    """

    read: Callable[[Sequence[Row]], Sequence[Example]]
    encode: Callable[[Sequence[Example], Tally], Sequence[Any]]
    make: Callable[[Row, int], Any]
    problems: Problems
    files: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def streams(
        self, names: Sequence[str], manner: Manner, limit: int | None, fraction: float, *, limit_each: bool
    ) -> tuple[list[StreamedDataset], list[StreamedDataset]]:
        """Go through files once.

        Args:
            names: Of the files.
            manner: How they are read.
            limit: Use the first rows only.
            fraction: Share of the rows for validation.
            limit_each: The limit holds for each file, and not for all together.

        Returns:
            The streams of all files for training, and those for validation.

        Raises:
            DataError: If a file cannot be streamed, a row cannot be used, or none is left.
        """
        files, tally = Files(names), Tally(self.problems.source)
        sides: tuple[list[StreamedDataset], list[StreamedDataset]] = ([], [])
        sources = [source for name in names if (source := self._open(name, manner)) is not None]
        left = limit
        for source in sources:
            kept = self._kept(source, limit if limit_each else left, fraction, tally)
            left = None if left is None else max(0, left - len(source))
            for side, rows in zip(sides, kept, strict=True):
                side.append(StreamedDataset(source, rows, self.make))
        self.problems.raise_if_any()
        tally.report()
        self.dropped = [tally.dropped]
        self.files = files.read({s.name: len(s) for s in sources}, self._digests(sources, files.elsewhere))
        return sides

    def _open(self, name: str, manner: Manner) -> RowSource | None:
        try:
            return open_source(name, manner)
        except UnreadableError as error:
            self.problems.add(name, str(error))
            return None

    def _digests(self, sources: Sequence[RowSource], names: Sequence[str]) -> dict[str, str]:
        """Of the rows of those that come from no file here."""
        return {
            source.name: digest_of_rows(row.fields for _, row in source.good_rows(self.problems))
            for source in sources
            if source.name in names
        }

    def _kept(self, source: RowSource, limit: int | None, fraction: float, tally: Tally) -> tuple[Kept, Kept]:
        """Go through one file; the rows for training and those for validation."""
        sides, ids = (Kept(), Kept()), Ids(source.name)
        rows = islice(source.good_rows(self.problems), limit)
        while bite := list(islice(rows, BITE)):
            for _, row in bite:
                ids.add(row)
            examples = self.read([row for _, row in bite])
            if self.problems.found:
                continue
            index_of = {row.where: index for index, row in bite}
            for example, item in self._staying(examples, tally):
                sides[is_held_out(example, fraction)].add(index_of[example.where], len(item))
        if not self.problems.found:  # otherwise rows are missing, and training ends before ids matter
            ids.report(lambda number: source[number].where)
        return sides

    def _staying(self, examples: Sequence[Any], tally: Tally) -> Iterator[tuple[Any, Any]]:
        """The examples that are not dropped, each with its item."""
        together = Tally(tally.dropped.source)
        items = self.encode(examples, together)
        if len(items) == len(examples):
            tally.add(together)
            yield from zip(examples, items, strict=True)
            return
        tally.lost.update(together.lost)
        singly = Tally(tally.dropped.source, losses=False)
        for example in examples:  # which of them are dropped shows one by one only
            for item in self.encode([example], singly):
                yield example, item
        tally.add(singly)
