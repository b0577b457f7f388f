"""What the data modules have in common: everything is read, checked and tokenised once, in ``setup``.

What was read stays in memory: files that are changed under a running job do not touch it. A job that goes on from a
checkpoint reads them anew, and refuses other data than it began with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.fingerprint import Files, Fingerprint, read_alike, refuse_other_data
from lightning_hybrid.data.reading import Format, Row, file_names, read_rows
from lightning_hybrid.data.splitting import Identified, split_by_hash
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


class TextDataModule(LightningDataModule, Generic[Example]):
    """What the three have in common; see `InstructionDataModule` for the arguments."""

    _drop_last = False

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
    ) -> None:
        super().__init__()
        check_choice("too_long", too_long, get_args(TooLong))
        check_positive("batch_size", batch_size)
        check_positive("limit", limit)
        if not 0.0 <= validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction must be at least 0 and below 1, found {validation_fraction}")
        if validation_path is not None and validation_fraction > 0:
            raise ConfigError("validation_path and validation_fraction are both set: choose one of them")
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
        self._train: Dataset[Any] | None = None
        self._validation: Dataset[Any] | None = None
        self._files: list[dict[str, Any]] = []
        self._fingerprint: Fingerprint | None = None

    @abstractmethod
    def _examples(self, rows: list[Row], problems: Problems) -> list[Example]:
        """Turn rows into examples, noting problems."""

    @abstractmethod
    def _dataset(self, examples: list[Example], source: str, *, training: bool) -> Dataset[Any]:
        """Tokenise examples."""

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
        self._files = []
        source = ", ".join(file_names(self.path))
        examples = self._read(self.path, self.limit)
        held_out: list[Example] = []
        if self.validation_path is not None:
            held_out = self._read(self.validation_path, None)
        elif self.validation_fraction:
            examples, held_out = split_by_hash(examples, self.validation_fraction, source)
        if held_out:
            validation_source = ", ".join(file_names(self.validation_path or self.path))
            self._validation = self._dataset(held_out, f"{validation_source} (validation)", training=False)
        self._train = self._dataset(examples, source, training=True)
        return {"files": self._files, "arguments": self._shape()}

    def _shape(self) -> dict[str, Any]:
        """The arguments that decide, with the files, what the examples are."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, str | int | float | None)}
        kept = {name: value for name, value in own.items() if not name.startswith("_") and name not in _SHAPELESS}
        return kept | {"max_length": self._rule().max_length}

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
        problems = Problems(", ".join(file_names(path)))
        files = Files(file_names(path))
        rows = read_rows(path, self.format, self.encoding, problems)
        examples = self._examples(rows[:limit], problems)
        problems.raise_if_any()
        self._files += files.read(Counter(row.where.rpartition(":")[0] for row in rows))
        return examples

    def _loader(self, dataset: Any, *, training: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=training,
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


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a `ConfigError` where a setting is not one of its choices."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")


def check_positive(name: str, value: int | None) -> None:
    """Raise a `ConfigError` where a setting is given and below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be 1 or more, found {value}")
