"""Settings of the data modules, one field for each of their arguments."""

from __future__ import annotations

import warnings
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings

SchemaName = Literal[
    "auto",
    "keys",
    "prompt",
    "prompt_response",
    "messages",
    "sharegpt",
    "alpaca",
    "question_answer",
    "chosen_rejected",
    "sharegpt_pairs",
    "two_outputs",
    "labelled",
]
FirstPath = Annotated[list[str], Field(min_length=1)]


def _one_source_of_validation(config: DataConfig) -> Problem | None:
    if config.validation_path is None or config.validation_fraction == 0:
        return None
    return Problem(
        "validation_fraction",
        "must be 0 when validation_path is set: choose one of them",
        repr(config.validation_fraction),
    )


def _one_share_for_each_path(config: DataConfig) -> Problem | None:
    paths = [config.path] if isinstance(config.path, str) else config.path or []  # those of the PTX loss may be none
    if config.mix is None or (len(config.mix) == len(paths) and len(set(paths)) == len(paths)):
        return None
    return Problem("mix", f"needs one share for each path, each named once: path = {paths}", repr(config.mix))


with warnings.catch_warnings():
    # pydantic still has a method of that name, from its first version, and warns of the field that hides it
    warnings.filterwarnings("ignore", 'Field name "schema"', UserWarning)

    class _SchemaConfig(Settings):
        schema: SchemaName = "auto"  # type: ignore[assignment]
        """what the columns mean; auto tells by their names and says what it found, keys goes by the settings that \
name columns alone, and so does auto where one of these is set"""


class DataConfig(_SchemaConfig):
    """What all data modules share: where the rows are, how to read them, and how many to take at a time."""

    rules: ClassVar[tuple[Rule, ...]] = (_one_source_of_validation, _one_share_for_each_path)

    path: str | FirstPath
    """file, folder of `Dataset.save_to_disk`, or name of a data set on the Hugging Face hub; or a list of them"""
    format: Literal["auto", "jsonl", "json", "csv", "lines", "labelled_lines", "parquet", "arrow"] = "auto"
    """how rows are written; auto goes by the file's name"""
    split: str | None = None
    """which split of a data set that has several"""
    name: str | None = None
    """which configuration of a data set on the hub that has several"""
    mix: list[PositiveFloat] | None = None
    """shares of the paths in what is drawn, one for each; null takes every row once"""
    streaming: bool = False
    """leave the rows in their files and read them for each batch, for files larger than memory"""
    encoding: str = "utf-8"
    """text encoding of the files"""
    limit: PositiveInt | None = None
    """use the first rows only, of each path where they are mixed; null for all"""
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
    """tokens that a row may have; null, or more than the model has positions, for those"""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """what happens to a row that is longer"""


class ChatDataConfig(DataConfig):
    """What all data modules share whose rows may be conversations."""

    template: str | None = None
    """chat template of conversations: chatml, plain, or a jinja file; null for the tokenizer's own"""
    chat: bool = False
    """make one turn of the user of each plain prompt too, and one of the assistant of its answer"""
    system: Literal["keep", "merge"] = "keep"
    """system turns: keep gives them to the template; merge puts a first one in front of the user's first words"""
    bos: bool = True
    """begin plain texts with the begin-of-text token, where the tokenizer has one; a template decides for itself"""


class AnswerDataConfig(ChatDataConfig):
    """What all data modules share whose rows have answers to learn."""

    add_eos: bool = True
    """end each answer with the end-of-text token, unless a template ends it with a special token of its own"""
    balance: bool = False
    """train on batches of texts of like length: less padding, and ranks that take equally long"""


def _packed_rows_are_of_like_length(config: InstructionDataConfig) -> Problem | None:
    if not (config.packing and config.balance):
        return None
    return Problem("balance", "must be false with packing: packed rows are of like length", "True")


class InstructionDataConfig(AnswerDataConfig):
    """Arguments of `InstructionDataModule`."""

    rules: ClassVar[tuple[Rule, ...]] = (*DataConfig.rules, _packed_rows_are_of_like_length)

    prompt_key: str | None = "prompt"
    """key of the prompt; null when the whole text is to be learned"""
    response_key: str = "response"
    """key of the text to learn"""
    packing: bool = False
    """put several texts into each row of max_length tokens, none of which sees another"""


def _lengths_are_known(config: PreferenceDataConfig) -> Problem | None:
    if not (config.balance and config.pairing == "labels"):
        return None
    return Problem("balance", "must be false with pairing=labels: pairs are drawn anew in each epoch", "True")


def _one_length_of_an_epoch(config: PreferenceDataConfig) -> Problem | None:
    if config.pairs is None or config.mix is None:
        return None
    return Problem("pairs", "must be null with mix, which decides how long an epoch is", repr(config.pairs))


class PreferenceDataConfig(AnswerDataConfig):
    """Arguments of `PreferenceDataModule`."""

    rules: ClassVar[tuple[Rule, ...]] = (*DataConfig.rules, _lengths_are_known, _one_length_of_an_epoch)

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


class UnpairedDataConfig(AnswerDataConfig):
    """Arguments of `UnpairedDataModule`."""

    prompt_key: str | None = "prompt"
    """key of the prompt; null when the response is a whole text"""
    response_key: str = "response"
    """key of the response"""
    label_key: str = "label"
    """key of the label: true or 1 where such a response is desired, false or 0 where not"""


class PromptDataConfig(ChatDataConfig):
    """Arguments of `PromptDataModule`; `rollout.max_new_tokens` is its remaining one."""

    prompt_key: str = "prompt"
    """key of the prompt"""
    first_words: PositiveInt | None = None
    """the prompt is this many first words of the text; null for all of it"""
