"""What a tokenizer makes of data: figures and samples, from the data modules that training uses."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_hybrid.config.inspect import (
    AnyInspection,
    InspectInstructions,
    InspectPreferences,
    InspectPrompts,
    InspectUnpaired,
)
from lightning_hybrid.data.balancing import LikeLengths, padding_share
from lightning_hybrid.data.checking import LOGGER
from lightning_hybrid.data.datamodules import (
    InstructionDataModule,
    PreferenceDataModule,
    PromptDataModule,
    UnpairedDataModule,
)
from lightning_hybrid.data.encoding import EncodedText
from lightning_hybrid.data.packing import pack
from lightning_hybrid.data.preferences import EncodedPreference
from lightning_hybrid.data.prompts import EncodedPrompt
from lightning_hybrid.data.unpaired import EncodedResponse
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.loading import why_not_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is looked at is all there is, one text to a row and of any length.
_WHOLE = {
    "validation_fraction": 0.0,
    "validation_path": None,
    "max_length": None,
    "balance": False,
    "packing": False,
}


@dataclass(frozen=True)
class Arrangement:
    """What becomes of the rows that training gets, in batches.

    Attributes:
        batch_size: Rows of a batch.
        random: Share of padding in batches of rows in any order.
        balanced: In batches of rows of like length.
        packed: Share of room left empty where rows hold several texts; None where they are not packed.
    """

    batch_size: int
    random: float
    balanced: float
    packed: float | None


@dataclass(frozen=True)
class Inspection:
    """What there is to see.

    Attributes:
        kind: Of the data: instructions, preferences, unpaired or prompts.
        tokenizer: That made the tokens.
        said: What the data module says on reading: schema, dropped rows, lost characters.
        files: Rows of each file.
        kept: Rows that become examples, of any length.
        dropped: Rows that do not, by reason.
        lengths: Tokens of each row, by what is counted.
        limit: Most tokens of a row; None for no limit.
        reserve: Tokens that must fit behind it.
        too_long: What happens to longer rows.
        beyond: Number of longer rows.
        repeated: Rows with the same tokens as one before them.
        arrangement: In batches; None for prompts, which are not padded to each other.
        samples: Texts of some rows, by what they are.
    """

    kind: str
    tokenizer: PreTrainedTokenizerBase
    said: list[str]
    files: dict[str, int]
    kept: int
    dropped: dict[str, int]
    lengths: dict[str, list[int]]
    limit: int | None
    reserve: int
    too_long: str
    beyond: int
    repeated: int
    arrangement: Arrangement | None
    samples: list[dict[str, EncodedText]]


def inspect_run(run: AnyInspection) -> Inspection:
    """Read, check and tokenise the data as training would, and count.

    Raises:
        ConfigError: If the tokenizer or the model's configuration cannot be found.
        DataError: As training would.
    """
    from lightning_hybrid.models import load_tokenizer

    tokenizer = load_tokenizer(run.model.tokenizer or str(run.model.path))
    kind, module = _module(run, tokenizer)
    with _heard() as said:
        module.setup()
    items = [module._train[index] for index in range(len(module._train))]
    parts = [_parts(item) for item in items]
    reserve = run.max_new_tokens if kind == "prompts" else 0
    limit = _limit(run)
    room = None if limit is None else limit - reserve
    longest = [len(item) for item in items]
    return Inspection(
        kind=kind,
        tokenizer=tokenizer,
        said=said,
        files={file["name"]: file["rows"] for file in module.state_dict()["files"]},
        kept=len(items),
        dropped=_reasons(module),
        lengths=_lengths(parts),
        limit=limit,
        reserve=reserve,
        too_long=run.data.too_long,
        beyond=0 if room is None else sum(length > room for length in longest),
        repeated=len(parts) - len({tuple(tuple(text.ids) for text in row.values()) for row in parts}),
        arrangement=None
        if kind == "prompts"
        else _arrangement(run, _trained_on(longest, room, run.data.too_long), room),
        samples=[
            parts[i] for i in sorted(random.Random(run.seed).sample(range(len(parts)), min(run.samples, len(parts))))
        ],
    )


def _module(run: AnyInspection, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Any]:
    """The kind of the data and the data module that training uses, for rows of any length."""
    kinds: dict[type, tuple[str, Any]] = {
        InspectInstructions: ("instructions", InstructionDataModule),
        InspectPreferences: ("preferences", PreferenceDataModule),
        InspectUnpaired: ("unpaired", UnpairedDataModule),
        InspectPrompts: ("prompts", PromptDataModule),
    }
    kind, module = kinds[type(run)]
    given = run.data.model_dump()
    arguments = given | {name: value for name, value in _WHOLE.items() if name in given} | {"tokenizer": tokenizer}
    if kind == "prompts":
        arguments |= {"batch_size": 1}  # a rollout's worth is not needed to look at them
    return kind, module(**arguments)


def _limit(run: AnyInspection) -> int | None:
    """Most tokens of a row with its reserve: as configured, else the positions of the model, if one is named."""
    from transformers import AutoConfig

    from lightning_hybrid.models import max_positions

    if run.data.max_length is not None or run.model.path is None:
        return run.data.max_length
    try:
        return max_positions(AutoConfig.from_pretrained(run.model.path))
    except (OSError, ValueError) as error:
        raise ConfigError(why_not_loaded(run.model.path, error)) from error


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what the project's logger says, in place of printing it."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, level, propagates = Collect(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagates


def _parts(item: Any) -> dict[str, EncodedText]:
    """The texts of an item, by what they are."""
    if isinstance(item, EncodedPreference):
        return {"chosen": item.chosen, "rejected": item.rejected}
    if isinstance(item, EncodedResponse):
        return {"desirable" if item.desirable else "undesirable": item.text}
    if isinstance(item, EncodedPrompt):
        return {"prompt": EncodedText(item.ids, [False] * len(item.ids))}
    return {"text": item}


def _lengths(parts: Sequence[dict[str, EncodedText]]) -> dict[str, list[int]]:
    lengths: dict[str, list[int]] = {}
    for row in parts:
        for name, text in row.items():
            lengths.setdefault(name, []).append(len(text))
            if any(text.learned):
                lengths.setdefault("learned" if name == "text" else f"learned of {name}", []).append(sum(text.learned))
    return lengths


def _reasons(module: Any) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for dropped in module.dropped:
        for reason, count in dropped.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return reasons


def _trained_on(lengths: Sequence[int], room: int | None, too_long: str) -> list[int]:
    """The lengths of the rows that training gets: long ones are cut, or left out."""
    if room is None:
        return [*lengths]
    if too_long == "truncate":
        return [min(length, room) for length in lengths]
    return [length for length in lengths if length <= room]


def _arrangement(run: AnyInspection, lengths: Sequence[int], room: int | None) -> Arrangement | None:
    if not lengths:
        return None
    size = run.data.batch_size
    shuffled = random.Random(run.seed).sample(range(len(lengths)), len(lengths))
    balanced = list(LikeLengths(lengths, size, run.seed))
    packed = None
    if room is not None and isinstance(run, InspectInstructions):
        packed = 1 - sum(lengths) / (len(pack(lengths, room)) * room)
    return Arrangement(size, padding_share(lengths, shuffled, size), padding_share(lengths, balanced, size), packed)
