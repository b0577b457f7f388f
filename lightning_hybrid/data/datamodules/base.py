"""What the data modules have in common: everything is read, checked and tokenised once, in ``setup``.

What was read stays in memory: files that are changed under a running job do not touch it. A job that goes on from a
checkpoint reads them anew, and refuses other data than it began with. With ``streaming`` the rows stay in their files
and are read again for each batch; a file that is changed meanwhile ends the run.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, Generic, Self, TypeVar, Unpack

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.data.checking import Dropped, Problems, Tally, gathered, say
from lightning_hybrid.data.datamodules.arguments import CommonArguments, ToldDataModule
from lightning_hybrid.data.dealing import DealtOrder
from lightning_hybrid.data.fingerprint import Files, Fingerprint, digest_of_rows, read_alike, refuse_other_data
from lightning_hybrid.data.ids import report_ids
from lightning_hybrid.data.mixing import Joined, Order, describe_mixture, refuse_empty_source
from lightning_hybrid.data.reading import Paths, Row, file_names, file_of, read_rows
from lightning_hybrid.data.recognition import Recogniser
from lightning_hybrid.data.splitting import Identified, refuse_empty_side, split_by_hash
from lightning_hybrid.data.streaming import StreamedDataset, Survey

Example = TypeVar("Example", bound=Identified)


class TextDataModule(ToldDataModule, Generic[Example]):
    """Reads rows, in memory or as a stream, and makes batches of them; see `InstructionDataModule` for arguments."""

    _drop_last = False

    def __init__(self, path: Paths, **common: Unpack[CommonArguments]) -> None:
        super().__init__(path, **common)
        self.dropped: list[Dropped] = []
        self._train: Dataset[Any] | None = None
        self._validation: Dataset[Any] | None = None
        self._files: list[dict[str, Any]] = []
        self._fingerprint: Fingerprint | None = None

    @abstractmethod
    def _examples(self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems) -> list[Example]:
        """Turn rows into examples, noting problems."""

    @abstractmethod
    def _encode(self, examples: Sequence[Example], source: str) -> list[Any]:
        """Tokenise examples; those that are dropped are counted and logged."""

    def _dataset(self, examples: Sequence[Example] | StreamedDataset, source: str, *, training: bool) -> Any:
        """Make the items of batches out of examples, or out of a stream that makes them itself."""
        return examples if isinstance(examples, StreamedDataset) else self._encode(examples, source)

    def _placed(self, item: Any, index: int) -> Any:
        """Tell an item its index in the data set, where it wants to know."""
        return item

    def _refuse_training_on(self, dataset: Any, source: str) -> None:
        """Raise where nothing can be learned of the items of a data set."""

    @abstractmethod
    def _collator(self) -> Callable[[Any], Any]:
        """Return the function that makes one batch out of items of the data set."""

    def setup(self, stage: str | None = None) -> None:
        """Read, check and tokenise all rows; later calls do nothing. In training, every rank must have read the same.

        Raises:
            ConfigError: If there is no tokenizer.
            DataError: If a file or a row cannot be used, or none is left; shows all problems of the files. Also if a
                file was changed while it was read, or a rank has read other data.
        """
        if self._train is None:
            ranks = self.trainer.world_size if self.trainer is not None and stage is not None else 1
            self._fingerprint = read_alike(self._read_all, ranks=ranks)

    def state_dict(self) -> dict[str, Any]:
        """What was read: of each file its bytes, rows and digest, and the arguments that shape the examples."""
        return dict(self._fingerprint or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with what was read now.

        Raises:
            DataError: If it is not the same; names what differs, and the fix.
        """
        if self._fingerprint is not None:
            refuse_other_data(state_dict, self._fingerprint)

    def _read_all(self) -> Fingerprint:
        self._files, source = [], ", ".join(file_names(self.path))
        parts, held_out = self._streams() if self.streaming else self._examples_in_memory()
        validation_source = f"{', '.join(file_names(self.validation_path or self.path))} (validation)"
        if held_out:
            names = [validation_source] * len(held_out)
            self._validation = self._joined(self._datasets(held_out, names, training=False))
        names = file_names(self.path) if len(parts) > 1 else [source]
        datasets = self._datasets(parts, names, training=True)
        if self.mix is not None:
            refuse_empty_source(names, datasets)
        train = self._joined(datasets)
        order = self.order(train)
        if self.mix is not None and isinstance(order, Order):
            say(describe_mixture(names, order))
        self._refuse_training_on(train, source)
        self._train = train
        return {"files": self._files, "arguments": self._shape()}

    def _datasets(self, parts: Sequence[Any], names: Sequence[str], *, training: bool) -> list[Any]:
        return [self._dataset(part, name, training=training) for part, name in zip(parts, names, strict=True)]

    def _joined(self, datasets: list[Any]) -> Any:
        return datasets[0] if len(datasets) == 1 else Joined(datasets, self._placed)

    def order(self, dataset: Any) -> DealtOrder:
        """The order of training, and this rank's share of it; Lightning's own would go by another seed than ours."""
        parts = dataset.parts if isinstance(dataset, Joined) else [dataset]
        blocks = [getattr(part, "blocks", [len(part)]) for part in parts]
        return Order(blocks, self.mix, self.seed, self._epoch, *self._ranks())

    def _examples_in_memory(self) -> tuple[list[list[Example]], list[list[Example]]]:
        """Examples for training, source by source where sources are mixed, and those for validation."""
        examples, held_out = self._read(self.path, self.limit), list[Example]()
        if self.validation_path is not None:
            held_out = self._read(self.validation_path, None)
        elif self.validation_fraction:
            examples, held_out = split_by_hash(examples, self.validation_fraction, ", ".join(file_names(self.path)))
        groups = {name: list[Example]() for name in file_names(self.path)} if self.mix else {"": list[Example]()}
        for example in examples:
            groups[file_of(example.where) if self.mix else ""].append(example)
        return [*groups.values()], [held_out] if held_out else []

    def _streams(self) -> tuple[list[StreamedDataset], list[StreamedDataset]]:
        """The same, of rows that stay in their files."""
        self._refuse_streaming()
        training, held_out = self._survey(self.path, self.limit, self.validation_fraction)
        if self.validation_path is not None:
            held_out, _ = self._survey(self.validation_path, None, 0.0)
        elif self.validation_fraction:
            kept, kept_out = (sum(len(stream) for stream in side) for side in (training, held_out))
            refuse_empty_side(kept, kept_out, self.validation_fraction, ", ".join(file_names(self.path)))
        return training, [stream for stream in held_out if len(stream)]

    def _refuse_streaming(self) -> None:
        """Raise a `ConfigError` for settings that need all rows at once."""

    def _survey(
        self, path: Paths, limit: int | None, fraction: float
    ) -> tuple[list[StreamedDataset], list[StreamedDataset]]:
        """Go through the files once; the streams of each for training and for validation."""
        names, settled, recogniser = file_names(path), self._settled(), self._recogniser()
        problems = Problems(", ".join(names))
        survey = Survey(
            read=partial(settled._examples, recogniser=recogniser, problems=problems),
            encode=settled._encode_bit,
            make=partial(settled._make_item, recogniser),
            problems=problems,
        )
        sides = survey.streams(names, self._manner(), limit, fraction, limit_each=self.mix is not None)
        recogniser.report()
        self._files += survey.files
        self.dropped += survey.dropped
        return sides

    def _settled(self) -> Self:
        """A copy that knows by itself what it would ask the trained module for: worker processes have none."""
        settled = copy(self)
        settled.tokenizer, settled.max_length, settled.trainer = self._tokens(), self._rule().max_length, None
        return settled

    def _encode_bit(self, examples: Sequence[Example], tally: Tally) -> list[Any]:
        """Tokenise a few of many examples; what is to be said about them goes to ``tally``."""
        counted = len(self.dropped)
        with gathered(tally):
            items = self._encode(examples, tally.dropped.source)
        del self.dropped[counted:]
        return items

    def _make_item(self, recogniser: Recogniser, row: Row, index: int) -> Any:
        """The item of a row of which the survey has found that it stays."""
        problems = Problems(row.where)
        examples = self._examples([row], recogniser, problems)
        problems.raise_if_any()
        (item,) = self._encode_bit(examples, Tally(row.where, losses=False))
        return self._placed(item, index)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's share of the training batches, shuffled by the seed and the number of the epoch."""
        self.setup()
        return self._loader(self._train, training=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches, in order; an empty list where no rows are kept for validation."""
        self.setup()
        return [] if self._validation is None else self._loader(self._validation, training=False)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation batches."""
        return self.val_dataloader()

    def _read(self, path: Paths, limit: int | None) -> list[Example]:
        names = file_names(path)
        problems, files, recogniser = Problems(", ".join(names)), Files(names), self._recogniser()
        by_file: dict[str, list[Row]] = {name: [] for name in names}
        for row in read_rows(path, self.format, self.encoding, problems, split=self.split, name=self.name):
            by_file[row.file].append(row)
        read = {name: len(rows) for name, rows in by_file.items()}
        digests = {name: digest_of_rows(row.fields for row in by_file[name]) for name in files.elsewhere}
        rows = first_rows(by_file, limit, each=self.mix is not None)
        examples = self._examples(rows, recogniser, problems)
        problems.raise_if_any()
        recogniser.report()
        report_ids(rows)
        self._files += files.read(read, digests)
        return examples

    def _loader(self, dataset: Any, *, training: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=self.order(dataset) if training else None,
            # Of its own: each pass draws a number, which training must not miss.
            generator=torch.Generator().manual_seed(self.seed),
            num_workers=self.num_workers,
            collate_fn=self._collator(),
            drop_last=training and self._drop_last,
        )


def first_rows(by_file: Mapping[str, Sequence[Row]], limit: int | None, *, each: bool) -> list[Row]:
    """The first rows, of all files together or of each."""
    if each:
        return [row for rows in by_file.values() for row in rows[:limit]]
    return [row for rows in by_file.values() for row in rows][:limit]
