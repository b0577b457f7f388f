from __future__ import annotations

import datetime
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_hybrid.data import InstructionDataModule, PromptDataModule
from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.hub import open_hub
from lightning_hybrid.data.reading import Manner, Row, UnreadableError, read_rows
from lightning_hybrid.data.streaming import open_source
from lightning_hybrid.data.tables import OPEN_GROUPS, ParquetRows
from lightning_hybrid.errors import ConfigError, DataError

pyarrow = pytest.importorskip("pyarrow", reason='needs pip install "lightning-hybrid[data]"')
datasets = pytest.importorskip("datasets", reason='needs pip install "lightning-hybrid[data]"')
ROWS = [{"prompt": f"mia visits {n}", "response": "the soup .", "n": n} for n in range(10)]


def as_parquet(path: Path, rows: list[Any] = ROWS, group: int = 3) -> str:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def as_arrow(path: Path, rows: list[Any] = ROWS, stream: bool = False) -> str:
    table = pyarrow.Table.from_pylist(rows)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return str(path)


def as_saved(path: Path, rows: list[Any] = ROWS) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


def as_splits(path: Path) -> str:
    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(both).save_to_disk(str(path))
    return str(path)


WRITERS = {
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "stream.arrow": lambda path: as_arrow(path, stream=True),
    "saved": as_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_give_the_rows_that_were_written_each_with_its_number(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name)
    expected = [Row(fields, f"{path}:row {number}") for number, fields in enumerate(ROWS, start=1)]
    assert read_rows(path) == expected
    source = open_source(path, Manner())
    assert [source[index] for index in (9, 0, 4, 3)] == [expected[index] for index in (9, 0, 4, 3)]


@pytest.mark.parametrize("name", WRITERS)
def test_opened_tables_can_be_sent_to_another_process(tmp_path: Path, name: str) -> None:
    source = open_source(WRITERS[name](tmp_path / name), Manner())
    assert pickle.loads(pickle.dumps(source))[7].fields == ROWS[7]


def test_of_a_parquet_file_few_row_groups_are_held(tmp_path: Path) -> None:
    source = ParquetRows(as_parquet(tmp_path / "a.parquet", ROWS * 9))
    assert [source[index].fields["n"] for index in range(90)] == [*range(10)] * 9
    assert len(source._groups) == OPEN_GROUPS
    assert sum(source.blocks) == len(source) == 90


def test_a_parquet_file_that_is_changed_while_it_is_streamed_is_refused(tmp_path: Path) -> None:
    source = ParquetRows(as_parquet(tmp_path / "a.parquet"))
    assert source[0].fields["n"] == 0
    as_parquet(tmp_path / "a.parquet", ROWS[::-1] * 2)
    with pytest.raises(DataError, match=r"a.parquet was changed while it was streamed: start again"):
        source[9]


@pytest.mark.parametrize("write_table", [as_arrow, as_saved])
def test_so_is_a_mapped_table(tmp_path: Path, write_table: Any) -> None:
    name = write_table(tmp_path / "a.arrow", [{"prompt": "mia"}] * 8)
    source = open_source(name, Manner("arrow" if write_table is as_arrow else "auto"))
    assert source[3].fields == {"prompt": "mia"}
    for file in [tmp_path / "a.arrow", *(tmp_path / "a.arrow").glob("*.arrow")]:
        os.utime(file, ns=(0, time.time_ns() + 10**9))
    with pytest.raises(DataError, match="was changed while it was streamed: start again"):
        source[3]


def test_several_kinds_of_files_are_read_together(tmp_path: Path, write: Any) -> None:
    paths = [as_parquet(tmp_path / "a.parquet"), as_saved(tmp_path / "saved"), write("c.jsonl", ROWS[:1])]
    assert [row.file for row in read_rows(paths)] == [paths[0]] * 10 + [paths[1]] * 10 + [paths[2]]


def test_a_split_is_chosen_by_name_and_without_one_all_are_listed(tmp_path: Path) -> None:
    path = as_splits(tmp_path / "both")
    assert len(read_rows(path, split="test")) == 2
    for split in (None, "dev"):
        with pytest.raises(DataError, match=f"has the splits train, test; set split to one of them, found {split!r}"):
            read_rows(path, split=split)
    with pytest.raises(DataError, match=r"holds one split \(without a name\), not 'test': leave split unset"):
        read_rows(as_saved(tmp_path / "one"), split="test")


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.parquet", "cannot be read as Parquet: "), ("a.arrow", "cannot be read as an Arrow file or stream: ")],
)
def test_a_table_that_is_none_is_named(write: Any, name: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: {message}"):
        read_rows(write(name, b"PAR1 nonsense"))


def test_a_table_without_rows_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from pyarrow import parquet

    path = str(tmp_path / "none.parquet")
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    for streaming in (False, True):
        with pytest.raises(DataError, match=r"none.parquet: the file has no rows"):
            PromptDataModule(path, tokenizer=tokenizer, streaming=streaming).setup()


def test_a_value_that_is_no_text_is_named_with_its_row(tmp_path: Path, tokenizer: Any) -> None:
    rows = [ROWS[0], {"prompt": None, "response": "x", "n": 1}]
    with pytest.raises(DataError, match=r"a.parquet:row 2: 'prompt' must be text, found NoneType"):
        InstructionDataModule(as_parquet(tmp_path / "a.parquet", rows), tokenizer=tokenizer).setup()
    dated = [{"prompt": datetime.date(2026, 1, 1), "response": "x"}]
    with pytest.raises(DataError, match=r"b.parquet:row 1: 'prompt' must be text, found date"):
        InstructionDataModule(as_parquet(tmp_path / "b.parquet", dated), tokenizer=tokenizer).setup()


def test_a_name_like_those_of_the_hub_that_cannot_be_reached_says_so_and_what_to_do() -> None:
    # HF_HUB_OFFLINE makes the hub unreachable at once, whatever this machine's network is.
    code = """
from lightning_hybrid.data.reading import read_rows
try:
    read_rows("nobody-at-all/no-such-data", split="train")
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("DataError 1 problem in nobody-at-all/no-such-data:")
    assert (
        "is neither a file nor a folder here, and as a data set of the Hugging Face hub it cannot be had: "
        in done.stdout
    )
    assert "HF_HUB_OFFLINE is set: unset it, or save it with Dataset.save_to_disk" in done.stdout


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_what_the_hub_holds_is_built_by_the_library(tmp_path: Path, write: Any, hub_cache: None) -> None:
    # A folder with data files is laid out like a repository of the hub, and opened by the same calls.
    (tmp_path / "repository").mkdir()
    for split in ("train", "test"):
        write(f"repository/{split}.jsonl", ROWS if split == "train" else ROWS[:2])
    source = open_hub(str(tmp_path / "repository"), Manner(split="test"))
    assert [row.fields for _, row in source.good_rows(Problems("hub"))] == ROWS[:2]
    with pytest.raises(UnreadableError, match="has the splits train, test; set split to one of them, found None"):
        open_hub(str(tmp_path / "repository"), Manner())


def test_what_is_not_written_plainly_is_refused_before_it_is_built(tmp_path: Path, hub_cache: None) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"no picture")
    with pytest.raises(
        UnreadableError, match="is written as imagefolder; readable are arrow, csv, json, parquet, text"
    ):
        open_hub(str(tmp_path / "pictures"), Manner())


@pytest.mark.parametrize("name", ["rows.jsonl", "data/rows.jsonl", "./owner/name", "/owner/name", "a/b/c", "../b"])
def test_names_that_are_none_of_the_hub_are_files(name: str) -> None:
    with pytest.raises(DataError, match=r"no such file|cannot be told from the ending"):
        read_rows(name)


def test_without_the_library_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_saved(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'needs the library datasets: pip install "lightning-hybrid\[data\]"'):
        read_rows(path)


def test_a_changed_data_set_is_not_gone_on_with(tmp_path: Path, tokenizer: Any) -> None:
    def state(rows: list[Any]) -> Any:
        folder = as_saved(tmp_path / str(len(rows)), rows)
        module = PromptDataModule(folder, tokenizer=tokenizer, batch_size=1)
        module.setup()
        return module, module.state_dict()

    module, own = state(ROWS)
    module.load_state_dict(own)
    with pytest.raises(DataError, match=r"10 rows, sha256 \w{12}; in the checkpoint: .* 9 rows"):
        module.load_state_dict(state(ROWS[:9])[1])
