"""Data sets of the `datasets` library: folders that it saved, and names on the Hugging Face hub.

No code that comes with data is run: no script of a data set, and no pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.fingerprint import refuse_change, stamp
from lightning_hybrid.data.reading import Manner, Row, UnreadableError

if TYPE_CHECKING:
    from lightning_hybrid.data.tables import RowSource

# What a data set on the hub may be written in; the library also has builders for media, archives and data bases.
PLAIN_BUILDERS = ("arrow", "csv", "json", "parquet", "text")


def open_saved(name: str, manner: Manner) -> RowSource:
    """Open a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        UnreadableError: If it cannot be read, or does not have the split.
    """
    import datasets

    try:
        found = datasets.load_from_disk(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableError(f"cannot be read as a folder of Dataset.save_to_disk: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        return _DatasetRows(name, found[_split_among(list(found), manner.split)])
    own = str(found.split or "")
    if manner.split not in (None, own):
        raise UnreadableError(f"holds one split ({own or 'without a name'}), not {manner.split!r}: leave split unset")
    return _DatasetRows(name, found)


def open_hub(name: str, manner: Manner) -> RowSource:
    """Open a data set of the hub, fetching it where it is not cached.

    Raises:
        UnreadableError: If the hub cannot be reached or has no such data set, configuration or split; or if the data
            set is not written in a plain format.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, manner.name)
        kind = type(builder).__module__.split(".")[-1]
        if kind not in (*PLAIN_BUILDERS, "cache"):
            raise UnreadableError(f"is written as {kind}; readable are {', '.join(PLAIN_BUILDERS)}")
        builder.download_and_prepare()
        split = _split_among(list(builder.info.splits or {}), manner.split)
        return _DatasetRows(name, builder.as_dataset(split=split))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UnreadableError(
            f"is neither a file nor a folder here, and as a data set of the Hugging Face hub it cannot be had: "
            f"{_in_short(error)}; {_remedy()}"
        ) from error


def _remedy() -> str:
    from huggingface_hub import constants

    copied = "save it with Dataset.save_to_disk where there is a network, and name that folder"
    first = "HF_HUB_OFFLINE is set: unset it" if constants.HF_HUB_OFFLINE else "check the name and the network"
    return f"{first}, or {copied}"


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _split_among(names: Sequence[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        raise UnreadableError(f"has the splits {', '.join(names)}; set split to one of them, found {split!r}")
    return split


class _DatasetRows:
    """Rows of a `datasets.Dataset`, which maps its files into memory."""

    blocks: Sequence[int] | None = None

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._stamp = stamp(name)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        refuse_change(self.name, self._stamp)
        return Row(dict(self._dataset[index]), f"{self.name}:row {index + 1}")

    def good_rows(self, problems: Problems) -> Iterator[tuple[int, Row]]:
        """All rows in order."""
        for index, fields in enumerate(self._dataset):
            yield index, Row(dict(fields), f"{self.name}:row {index + 1}")
