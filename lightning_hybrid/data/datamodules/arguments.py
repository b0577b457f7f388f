"""What a data module is told, and what it asks the module that is trained for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, get_args

from lightning.pytorch import LightningDataModule

from lightning_hybrid.config.data import SchemaName
from lightning_hybrid.data.reading import Format, Manner, Paths, file_names
from lightning_hybrid.data.recognition import Recogniser, Task, schema_problem
from lightning_hybrid.data.tokenizing import LengthRule, TooLong
from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# None changes an example: where files stand, and how batches are made of what is in them.
_SHAPELESS = {"path", "validation_path", "template", "tokenizer", "batch_size", "num_workers", "trainer"}


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


class ToldDataModule(LightningDataModule):
    """Keeps the arguments that all data modules take; see `InstructionDataModule` for them."""

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
        self._refuse_arguments()

    def _refuse_arguments(self) -> None:
        check_choice("too_long", self.too_long, get_args(TooLong))
        check_positive("batch_size", self.batch_size)
        check_positive("limit", self.limit)
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ConfigError(f"validation_fraction must be at least 0 and below 1, found {self.validation_fraction}")
        if self.validation_path is not None and self.validation_fraction > 0:
            raise ConfigError("validation_path and validation_fraction are both set: choose one of them")
        wrong = mix_problem(self.path, self.mix) or schema_problem(self._task, self.schema)
        if wrong:
            raise ConfigError(wrong)

    def _ranks(self) -> tuple[int, int]:
        """How many ranks share the rows, and which of them this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

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

    def _tokens(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            self.tokenizer = getattr(self._module(), "tokenizer", None)
        if self.tokenizer is None:
            raise ConfigError(f"{type(self).__name__} has no tokenizer: pass tokenizer=..., the one of the model")
        return self.tokenizer

    def _rule(self, reserve: int = 0) -> LengthRule:
        limits = self.max_length, getattr(self._module(), "max_positions", None)
        limit = min((limit for limit in limits if limit is not None), default=None)
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


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a `ConfigError` where a setting is not one of its choices."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, found {value!r}")


def check_positive(name: str, value: int | None) -> None:
    """Raise a `ConfigError` where a setting is given and below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{name} must be 1 or more, found {value}")
