"""Settings of the data modules, one field for each of their arguments."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings

FirstPath = Annotated[list[str], Field(min_length=1)]


def _one_source_of_validation(config: DataConfig) -> Problem | None:
    if config.validation_path is None or config.validation_fraction == 0:
        return None
    return Problem(
        "validation_fraction",
        "must be 0 when validation_path is set: choose one of them",
        repr(config.validation_fraction),
    )


class DataConfig(Settings):
    """What all data modules share: where the rows are, how to read them, and how many to take at a time."""

    rules: ClassVar[tuple[Rule, ...]] = (_one_source_of_validation,)

    path: str | FirstPath
    """file, or list of files"""
    format: Literal["auto", "jsonl", "json", "csv", "lines", "labelled_lines"] = "auto"
    """how rows are written; auto goes by the file's name"""
    encoding: str = "utf-8"
    """text encoding of the files"""
    limit: PositiveInt | None = None
    """use the first rows only; null for all"""
    seed: int = 0
    """order of the rows and draw of the pairs"""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """share of the rows kept for validation"""
    validation_path: str | FirstPath | None = None
    """file, or list of files, for validation"""
    batch_size: PositiveInt = 8
    """rows of one batch on each rank"""
    num_workers: NonNegativeInt = 0
    """processes that prepare batches; 0 prepares them in the training process"""
    max_length: PositiveInt | None = None
    """tokens that a row may have; null for the model's positions"""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """what happens to a row that is longer"""


class InstructionDataConfig(DataConfig):
    """Arguments of `InstructionDataModule`."""

    prompt_key: str | None = "prompt"
    """key of the prompt; null when the whole text is to be learned"""
    response_key: str = "response"
    """key of the text to learn"""
    add_eos: bool = True
    """end each response with the end-of-text token"""
    bos: bool = True
    """begin each row with the begin-of-text token, where the tokenizer has one"""


class PreferenceDataConfig(DataConfig):
    """Arguments of `PreferenceDataModule`."""

    chosen_key: str = "chosen"
    """key of the preferred text"""
    rejected_key: str = "rejected"
    """key of the other text"""
    prompt_key: str | None = None
    """key of the prompt that both continue; null when the texts contain it"""
    margin_key: str | None = None
    """key of a number by which the preferred text should lead; null for none"""
    pairing: Literal["rows", "labels"] = "rows"
    """rows: each row is a pair; labels: draw pairs of a row with label 1 over a row with label 0"""
    pairs: PositiveInt | None = None
    """pairs drawn for one epoch when pairing by labels; null for as many as there are rows"""
    add_eos: bool = True
    """end each text with the end-of-text token"""
    bos: bool = True
    """begin each text with the begin-of-text token, where the tokenizer has one"""


class PromptDataConfig(DataConfig):
    """Arguments of `PromptDataModule`; `rollout.max_new_tokens` is its remaining one."""

    prompt_key: str = "prompt"
    """key of the prompt"""
    first_words: PositiveInt | None = None
    """the prompt is this many first words of the text; null for all of it"""
    bos: bool = True
    """begin each prompt with the begin-of-text token, where the tokenizer has one"""
