from __future__ import annotations

import gzip
import json
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.reading import Row, read_rows
from lightning_hybrid.errors import DataError

FORMATS = ["auto", "jsonl", "json", "csv", "lines", "labelled_lines"]


def test_jsonl_rows_remember_file_and_line_and_blank_lines_are_skipped(write):
    name = write("a.jsonl", '{"a": 1}\n\n{"a": "x\u2028y"}\r\n')
    assert read_rows(name) == [Row({"a": 1}, f"{name}:1"), Row({"a": "x\u2028y"}, f"{name}:3")]


def test_gzipped_jsonl_is_read_by_its_ending(write):
    name = write("a.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
    assert read_rows(name) == [Row({"a": 1}, f"{name}:1")]


def test_json_items_remember_the_line_on_which_they_begin(write):
    name = write("a.json", '[\n  {"a": [1,\n 2]}, {"b": 1},\n\n{"c": 2}\n]')
    assert [row.where for row in read_rows(name)] == [f"{name}:2", f"{name}:3", f"{name}:5"]


def test_csv_rows_may_hold_quoted_line_ends(write):
    name = write("a.csv", 'prompt,response\n"two\nlines",yes\nb,no\n')
    rows = read_rows(name)
    assert rows[0] == Row({"prompt": "two\nlines", "response": "yes"}, f"{name}:2")
    assert rows[1].where == f"{name}:4"


def test_a_csv_field_may_be_longer_than_the_limit_of_the_csv_module(write):
    long = "word " * 40_000
    assert read_rows(write("a.csv", f"text,n\n{long},1\n"))[0].fields["text"] == long


def test_files_may_be_named_by_paths(write):
    name = write("a.txt", "x\n")
    assert read_rows(Path(name)) == read_rows([Path(name)]) == read_rows(name) == [Row({"text": "x"}, f"{name}:1")]


def test_lines_end_at_newlines_only(write):
    name = write("a.txt", b"one\x85still one \r\n\ntwo\n")
    assert [row.fields["text"] for row in read_rows(name, encoding="latin-1")] == ["one\x85still one", "two"]


def test_labelled_lines_give_an_integer_and_a_text(write):
    name = write("a.dev", "1 good film\n0 bad  film\n")
    rows = read_rows(name, "labelled_lines")
    assert [row.fields for row in rows] == [{"text": "good film", "label": 1}, {"text": "bad  film", "label": 0}]


def test_several_files_are_read_in_order(write):
    names = [write("b.txt", "x\n"), write("a.txt", "y\n")]
    assert [row.where for row in read_rows(names)] == [f"{names[0]}:1", f"{names[1]}:1"]


def test_a_byte_order_mark_is_skipped(write):
    assert read_rows(write("a.csv", b"\xef\xbb\xbftext\nhello\n"))[0].fields == {"text": "hello"}


def test_all_problems_of_a_file_come_in_one_error_and_twenty_are_shown(write):
    name = write("a.jsonl", "{}\n" + "{broken\n" * 30)
    with pytest.raises(
        DataError, match=r"30 problems in .*\n.*a\.jsonl:2: not valid JSON.*(\n.*)*\.\.\. and 10 more"
    ) as e:
        read_rows(name)
    assert len(str(e.value).splitlines()) == 22


def test_problems_of_several_files_are_collected(write, tmp_path):
    with pytest.raises(DataError, match=r"(?s)2 problems.*no such file.*the file is empty"):
        read_rows([str(tmp_path / "none.txt"), write("empty.txt", "\n \n")])


def test_a_given_collector_gets_the_problems_and_the_good_rows_come_back(write):
    problems = Problems("here")
    assert len(read_rows(write("a.jsonl", '{"a": 1}\n[1]\n'), problems=problems)) == 1
    with pytest.raises(
        DataError, match=r"1 problem in here:\n.*a.jsonl:2: expected an object with named fields, found list"
    ):
        problems.raise_if_any()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", "", {}, "the file is empty"),
        ("a.json", "[]", {}, "the file has no rows"),
        ("a.json", '{"a": 1}', {}, "expected a list of objects, found dict"),
        ("a.json", '{"a": 1}\n{"a": 2}', {}, "a.json:2: not valid JSON.*set format to jsonl"),
        ("a.json", '[{"a": 1},\n3]', {}, "a.json:2: expected an object with named fields, found int"),
        ("a.jsonl", "[" * 100_000, {}, "a.jsonl:1: not valid JSON"),
        ("a.jsonl", "9" * 5_000, {}, "a.jsonl:1: not valid JSON"),
        ("a.csv", "a,b\n1\n1,2,3\n", {}, "(?s)a.csv:2: 1 fields, but the header has 2.*a.csv:3: 3 fields"),
        ("a.csv", "a,a\n1,2\n", {}, "the header names a column twice: a, a"),
        ("a.csv", 'a\n"never closed\n', {}, "a.csv:2: not valid CSV"),
        ("a.csv", "a,b\n", {}, "the file has no rows"),
        ("a.txt", b"fine\ncaf\xe9\n", {}, "line 2 is not utf-8: byte 0xe9 .* set encoding, for example latin-1"),
        ("a.txt", "x", {"encoding": "utf-9"}, "unknown text encoding 'utf-9'"),
        ("a.txt", "x", {"encoding": "rot13"}, "unknown text encoding 'rot13'"),
        ("a.txt", "x", {"format": "xml"}, "unknown format 'xml'; known are auto, jsonl"),
        ("a.pos", "x", {}, "cannot be told from the ending '.pos'; set format to one of jsonl"),
        ("a.txt", "good film\n", {"format": "labelled_lines"}, "a.txt:1: expected 'label text'.*found 'good film'"),
        ("a.jsonl.gz", b"not gzip", {}, "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], {}, "cannot be read: Compressed file ended"),
    ],
)
def test_a_bad_file_is_named_with_its_problem(write, name, content, options, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(name, content), **options)


def test_a_folder_and_an_empty_list_of_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder; name the files in it"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match="path: names no file"):
        read_rows([])
    with pytest.raises(DataError, match="no such file"):
        read_rows("null\0byte.txt")


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(content=st.binary(max_size=200), format=st.sampled_from(FORMATS), gz=st.booleans(), latin=st.booleans())
def test_any_bytes_give_rows_or_a_data_error(tmp_path: Path, content, format, gz, latin):
    path = tmp_path / f"x.jsonl{'.gz' if gz else ''}"
    path.write_bytes(content)
    try:
        rows = read_rows(str(path), format, "latin-1" if latin else "utf-8")
    except DataError:
        return
    assert rows


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=6,
)


@quick
@given(values=st.lists(json_values, min_size=1, max_size=5))
def test_any_json_lines_give_one_row_for_each_object_or_a_data_error(tmp_path: Path, values):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    if all(isinstance(value, dict) for value in values):
        assert len(read_rows(str(path))) == len(values)
    else:
        with pytest.raises(DataError, match="expected an object"):
            read_rows(str(path))


@quick
@given(
    texts=st.lists(
        st.text(string.printable + "é\u2028\x85", min_size=1).filter(lambda t: t.strip(" \t\r\n")), min_size=1
    )
)
def test_csv_and_json_bring_back_the_texts_written_to_them(tmp_path: Path, texts):
    import csv

    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    (tmp_path / "x.json").write_text(json.dumps([{"text": text} for text in texts]))
    for name in ("x.csv", "x.json"):
        assert [row.fields["text"] for row in read_rows(str(tmp_path / name))] == texts


def test_real_files_have_the_rows_that_their_sources_state(shared):
    for name, format, encoding, count in [
        ("sst2_stsa.binary.train", "labelled_lines", "utf-8", 6920),
        ("sst2_stsa.binary.dev", "labelled_lines", "utf-8", 872),
        ("rt-polarity.pos", "lines", "latin-1", 5331),
        ("rt-polarity.neg", "lines", "latin-1", 5331),
        ("hh_rlhf_harmless_base_test.jsonl.gz", "auto", "utf-8", 2312),
        ("gsm8k_train.jsonl", "auto", "utf-8", 7473),
        ("llamafactory_dpo_en_demo.json", "auto", "utf-8", 300),
    ]:
        assert len(read_rows(str(shared / "data" / name), format, encoding)) == count, name
