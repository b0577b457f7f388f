"""What the data modules have in common: everything is read, checked and tokenised once, in ``setup``.

What was read stays in memory: files that are changed under a running job do not touch it. A job that goes on from a
checkpoint reads them anew, and refuses other data than it began with. With ``streaming`` the rows stay in their files
and are read again for each batch; a file that is changed meanwhile ends the run.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypedDict, TypeVar, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.config.data import SchemaName
from lightning_hybrid.data.checking import Dropped, Problems, Tally, gathered, say
from lightning_hybrid.data.fingerprint import Files, Fingerprint, digest_of_rows, read_alike, refuse_other_data
from lightning_hybrid.data.ids import report_ids
from lightning_hybrid.data.mixing import Joined, Order, describe_mixture
from lightning_hybrid.data.reading import Format, Manner, Row, file_names, file_of, read_rows
from lightning_hybrid.data.recognition import Recogniser, Task, schema_problem
from lightning_hybrid.data.splitting import Identified, refuse_empty_side, split_by_hash
from lightning_hybrid.data.streaming import StreamedDataset, Survey
from lightning_hybrid.data.tokenizing import LengthRule, TooLong
from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = TypeVar("Example", bound=Identified)
Paths = str | Sequence[str]

# Neither changes an example: where files stand, and how batches are made of what is in them.
_SHAPELESS = {"path", "validation_path", "tokenizer", "batch_size", "num_workers", "trainer"}


class CommonArguments(TypedDict, total=False):
    """The arguments that all data modules take besides ``path``; see `InstructionDataModule` for their meaning."""

    tokenizer: PreTrainedTokenizerBase | None
    batch_size: int
    format: Format
    encoding: str
    limit: int | None
    seed: int
    validation_fraction: float
    validation_path: Paths | None
    num_workers: int
    max_length: int | None
    too_long: TooLong
    schema: SchemaName
    mix: Sequence[float] | None
    streaming: bool
    split: str | None
    name: str | None


class TextDataModule(LightningDataModule, Generic[Example]):
    """What the three have in common; see `InstructionDataModule` for the arguments."""

    _drop_last = False
    _task: ClassVar[Task]
    _default_keys: ClassVar[Mapping[str, str | None]] = {}
    """The arguments that name columns; where none is set otherwise, the columns of the rows tell their schema."""

    def __init__(
        self,
        path: Paths,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        format: Format = "auto",
        encoding: str = "utf-8",
        limit: int | None = None,
        seed: int = 0,
        validation_fraction: float = 0.0,
        validation_path: Paths | None = None,
        num_workers: int = 0,
        max_length: int | None = None,
        too_long: TooLong = "drop",
        schema: SchemaName = "auto",
        mix: Sequence[float] | None = None,
        streaming: bool = False,
        split: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("too_long", too_long, get_args(TooLong))
        check_positive("batch_size", batch_size)
        check_positive("limit", limit)
        if not 0.0 <= validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction must be at least 0 and below 1, found {validation_fraction}")
        if validation_path is not None and validation_fraction > 0:
            raise ConfigError("validation_path and validation_fraction are both set: choose one of them")
        wrong = mix_problem(path, mix) or schema_problem(self._task, schema)
        if wrong:
            raise ConfigError(wrong)
        self.path = path
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.format: Format = format
        self.encoding = encoding
        self.limit = limit
        self.seed = seed
        self.validation_fraction = validation_fraction
        self.validation_path = validation_path
        self.num_workers = num_workers
        self.max_length = max_length
        self.too_long: TooLong = too_long
        self.schema: SchemaName = schema
        self.mix = None if mix is None else [float(share) for share in mix]
        self.streaming = streaming
        self.split = split
        self.name = name
        self.dropped: list[Dropped] = []
        self._order: Order | None = None
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

    def _refuse_size(self, count: int, source: str) -> None:
        """Raise where there are too few rows to train on."""

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
        self._order = self._order_of(datasets, names)
        self._train = self._joined(datasets)
        self._refuse_size(sum(len(dataset) for dataset in datasets), source)
        return {"files": self._files, "arguments": self._shape()}

    def _datasets(self, parts: Sequence[Any], names: Sequence[str], *, training: bool) -> list[Any]:
        return [self._dataset(part, name, training=training) for part, name in zip(parts, names, strict=True)]

    def _joined(self, datasets: list[Any]) -> Any:
        return datasets[0] if len(datasets) == 1 else Joined(datasets, self._placed)

    def _order_of(self, datasets: Sequence[Any], names: Sequence[str]) -> Order | None:
        """The order of training, where it is not any order of all rows."""
        blocks = [getattr(dataset, "blocks", [len(dataset)]) for dataset in datasets]
        if self.mix is not None and getattr(self, "balance", False):
            raise ConfigError("mix and balance are both set, and each decides the order of rows: choose one of them")
        if self.mix is None and all(len(sizes) == 1 for sizes in blocks):
            return None
        order = Order(blocks, self.mix, self.seed, self._epoch)
        if self.mix is not None:
            say(describe_mixture(names, order))
        return order

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

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

    def _recogniser(self) -> Recogniser:
        """Goes by the keys alone where one of them is set to another name than the default."""
        named = [key for key, default in self._default_keys.items() if getattr(self, key) != default]
        if named and self.schema not in ("auto", "keys"):
            raise ConfigError(f"schema {self.schema!r} and {', '.join(named)} are both set: choose one of them")
        return Recogniser(self._task, "keys" if named else self.schema)

    def _manner(self) -> Manner:
        return Manner(self.format, self.encoding, self.split, self.name)

    def _shape(self) -> dict[str, Any]:
        """The arguments that decide, with the files, what the examples are."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, str | int | float | None)}
        kept = {name: value for name, value in own.items() if not name.startswith("_") and name not in _SHAPELESS}
        return kept | {"max_length": self._rule().max_length, "mix": self.mix}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, shuffled by the seed; Lightning gives each rank its share."""
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
        ordered = training and self._order is not None
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=training and not ordered,
            sampler=self._order if ordered else None,
            generator=torch.Generator().manual_seed(self.seed) if training else None,
            num_workers=self.num_workers,
            collate_fn=self._collator(),
            drop_last=training and self._drop_last,
        )

    def _tokens(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            self.tokenizer = getattr(self._module(), "tokenizer", None)
        if self.tokenizer is None:
            raise ConfigError(f"{type(self).__name__} has no tokenizer: pass tokenizer=..., the one of the model")
        return self.tokenizer

    def _rule(self, reserve: int = 0) -> LengthRule:
        limit = getattr(self._module(), "max_positions", None) if self.max_length is None else self.max_length
        return LengthRule(limit, self.too_long, reserve)

    def _module(self) -> Any:
        """The module that is trained, where there is one yet."""
        return getattr(self.trainer, "lightning_module", None)


def mix_problem(path: Paths, mix: Sequence[float] | None) -> str:
    """What is wrong with the shares of sources; empty where nothing is."""
    names = file_names(path)
    if mix is None:
        return ""
    if len(mix) != len(names) or len(set(names)) < len(names):
        return f"mix needs one share for each path, each named once: {len(mix)} shares, path {', '.join(names)}"
    if not all(0 < share < math.inf for share in mix):
        return f"mix must be numbers above 0, found {list(mix)}"
    return ""


def first_rows(by_file: Mapping[str, Sequence[Row]], limit: int | None, *, each: bool) -> list[Row]:
    """The first rows, of all files together or of each."""
    if each:
        return [row for rows in by_file.values() for row in rows[:limit]]
    return [row for rows in by_file.values() for row in rows][:limit]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a `ConfigError` where a setting is not one of its choices."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")


def check_positive(name: str, value: int | None) -> None:
    """Raise a `ConfigError` where a setting is given and below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be 1 or more, found {value}")
