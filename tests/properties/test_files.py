"""Any file, of any bytes, gives rows or one error of ours; any row gives batches or one."""

from __future__ import annotations

import gzip
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule, PromptDataModule, read_rows
from lightning_hybrid.data.task import build_tokenizer
from tests.properties import inputs
from tests.properties.cases import cases, success_or_our_own_error

ENDINGS = [".jsonl", ".json", ".csv", ".txt", ".JSONL", ".dat", "", ".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz"]
FORMATS = ["auto", "auto", "auto", "jsonl", "json", "csv", "lines", "labelled_lines", "xml"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-7", "latin-1", "ascii", "cp037", "shift_jis", "gb18030"]
ODD_ENCODINGS = ["hex", "zlib", "idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "no-such", ""]
TOKENIZER = build_tokenizer()


@dataclass(frozen=True)
class File:
    ending: str
    content: bytes


def in_its_form(write: Any, ending: str) -> st.SearchStrategy[File]:
    """A file whose name says truly how it is written, packed or not."""

    def make(rows: list[Any], packed: bool) -> File:
        content = write(rows).encode()
        return File(f"{ending}.gz", gzip.compress(content, mtime=0)) if packed else File(ending, content)

    return st.builds(make, inputs.rows, st.booleans())


right = st.one_of(
    in_its_form(inputs.as_jsonl, ".jsonl"),
    in_its_form(json.dumps, ".json"),
    in_its_form(inputs.as_csv, ".csv"),
    in_its_form(inputs.as_labelled_lines, ".txt"),
)
spoilt = st.builds(lambda file, content: File(file.ending, content), right, inputs.file_bytes)
slightly_spoilt = right.flatmap(
    lambda file: st.builds(File, st.just(file.ending), inputs.spoilt(st.just(file.content)))
)
anything = st.builds(File, st.sampled_from(ENDINGS), inputs.file_bytes)
encodings = st.one_of(st.sampled_from(ENCODINGS), st.sampled_from(ODD_ENCODINGS), st.text(max_size=5))
files = st.one_of(
    st.tuples(st.lists(st.one_of(right, slightly_spoilt), min_size=1, max_size=2), st.just("auto"), st.just("utf-8")),
    st.tuples(st.lists(slightly_spoilt, min_size=1, max_size=2), st.just("auto"), encodings),
    st.tuples(st.lists(st.one_of(spoilt, anything), min_size=1, max_size=2), st.sampled_from(FORMATS), encodings),
)


@cases(files, few=60, many=2600)
def test_files_are_read_or_refused(case: tuple[list[File], Any, str], folder: Path) -> None:
    written, format, encoding = case
    paths = [folder / f"rows{index}{file.ending}" for index, file in enumerate(written)]
    for path, file in zip(paths, written, strict=True):
        path.write_bytes(file.content)
    with success_or_our_own_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of unicode_escape, on what it may refuse some day
        rows = read_rows([str(path) for path in paths], format, encoding)
        assert rows
        assert all(isinstance(row.fields, dict) for row in rows)


@cases(st.lists(st.text(max_size=30), max_size=2), few=20, many=300)
def test_names_of_files_are_found_or_refused(names: list[str], folder: Path) -> None:
    with success_or_our_own_error():
        read_rows([f"{folder}/{name}" for name in names])


common = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 3)},
    optional={
        "max_length": st.integers(1, 12),
        "too_long": st.sampled_from(["drop", "truncate", "error"]),
        "validation_fraction": st.sampled_from([0.0, 0.5]),
        "limit": st.integers(1, 5),
        "bos": st.booleans(),
        "seed": st.integers(0, 3),
    },
)
odd_key = st.sampled_from([*inputs.KEYS, "no such key"])
instruction_settings = st.fixed_dictionaries(
    {}, optional={"prompt_key": st.one_of(st.none(), odd_key), "response_key": odd_key, "add_eos": st.booleans()}
)
preference_settings = st.fixed_dictionaries(
    {"pairing": st.sampled_from(["rows", "labels"])},
    optional={
        "prompt_key": st.one_of(st.none(), odd_key),
        "margin_key": st.just("margin"),
        "pairs": st.integers(1, 4),
        "add_eos": st.booleans(),
    },
)
prompt_settings = st.fixed_dictionaries(
    {}, optional={"prompt_key": odd_key, "first_words": st.integers(1, 4), "max_new_tokens": st.integers(1, 6)}
)


def batches_of(kind: Any, rows: list[Any], settings: dict[str, Any], folder: Path) -> list[Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = kind(str(path), tokenizer=TOKENIZER, **settings)
    return [*module.train_dataloader(), *module.val_dataloader()]


def check_tokens(input_ids: torch.Tensor, mask: torch.Tensor) -> None:
    assert input_ids.shape == mask.shape
    assert mask.any(1).all()
    assert ((input_ids >= 0) & (input_ids < len(TOKENIZER))).all()


@cases(st.tuples(inputs.rows, common, instruction_settings), few=30, many=1000)
def test_instructions_are_read_or_refused(case: Any, folder: Path) -> None:
    rows, shared, own = case
    with success_or_our_own_error():
        for batch in batches_of(InstructionDataModule, rows, shared | own, folder):
            check_tokens(batch["input_ids"], batch["attention_mask"])
            assert batch["loss_mask"].any(1).all()
            assert (batch["loss_mask"] <= batch["attention_mask"]).all()


@cases(st.tuples(inputs.rows, common, preference_settings), few=30, many=1000)
def test_preferences_are_read_or_refused(case: Any, folder: Path) -> None:
    rows, shared, own = case
    with success_or_our_own_error():
        for batch in batches_of(PreferenceDataModule, rows, shared | own, folder):
            check_tokens(**renamed(batch["chosen"]))
            check_tokens(**renamed(batch["rejected"]))
            assert batch.get("margin", torch.zeros(1)).isfinite().all()


def renamed(side: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": side["input_ids"], "mask": side["attention_mask"]}


@cases(st.tuples(inputs.rows, common, prompt_settings), few=30, many=1000)
def test_prompts_are_read_or_refused(case: Any, folder: Path) -> None:
    rows, shared, own = case
    with success_or_our_own_error():
        for batch in batches_of(PromptDataModule, rows, shared | own, folder):
            assert all(0 <= index < len(TOKENIZER) for ids in batch["prompt_ids"] for index in ids)
            assert all(batch["prompt_ids"])
            assert len(batch["prompts"]) == len(batch["prompt_ids"])
