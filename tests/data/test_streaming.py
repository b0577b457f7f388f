from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.checkpoint import ResumableLoader
from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule, PromptDataModule, UnpairedDataModule
from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.reading import Manner, read_rows
from lightning_hybrid.data.streaming import BITE, StreamedDataset, open_source
from lightning_hybrid.errors import ConfigError, DataError

PROMPTS = [{"prompt": f"mia visits {'the ' * (n % 12)}{n}", "n": n} for n in range(40)]


def batches_of(module: Any) -> list[Any]:
    return list(module.train_dataloader())


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


def test_a_stream_gives_the_batches_of_data_in_memory(write: Any, tokenizer: Any) -> None:
    """Also where rows are dropped, split off, or their file has odd lines."""
    lines = [json.dumps(row) for row in PROMPTS]
    lines[3:3] = ["", "  \t"]
    name = write("a.jsonl", "\ufeff" + "\r\n".join(lines))
    for arguments in (
        {"max_length": 16, "max_new_tokens": 4, "too_long": "drop"},
        {"max_length": 16, "max_new_tokens": 4, "too_long": "truncate", "validation_fraction": 0.3},
        {"limit": 7},
    ):
        pair = [
            PromptDataModule(name, tokenizer=tokenizer, batch_size=2, streaming=streaming, **arguments)
            for streaming in (False, True)
        ]
        plain, streamed = map(batches_of, pair)
        assert plain
        assert equal_all(plain, streamed)
        assert equal_all(list(pair[0].val_dataloader()), list(pair[1].val_dataloader()))


def equal_all(plain: list[Any], streamed: list[Any]) -> bool:
    return len(plain) == len(streamed) and all(equal(*both) for both in zip(plain, streamed, strict=True))


def test_so_does_a_stream_of_pairs_and_of_instructions(write: Any, tokenizer: Any) -> None:
    rows = [
        {
            "prompt": f"mia visits the farm {'. ' * (n % 5)}",
            "chosen": "the soup is warm .",
            "rejected": "ice " * (n % 3),
        }
        for n in range(30)
    ]
    name = write("a.jsonl", rows)
    for kind, own in (
        (PreferenceDataModule, {}),
        (PreferenceDataModule, {"balance": True}),
        (InstructionDataModule, {"response_key": "chosen"}),
        (InstructionDataModule, {"response_key": "chosen", "balance": True}),
        (InstructionDataModule, {"response_key": "chosen", "packing": True, "max_length": 32}),
    ):
        plain, streamed = (
            batches_of(kind(name, tokenizer=tokenizer, batch_size=4, streaming=streaming, **own))  # type: ignore[arg-type]
            for streaming in (False, True)
        )
        assert equal_all(plain, streamed)


@pytest.mark.parametrize("setting", ["packing", "balance"])
def test_rows_in_row_groups_are_not_put_together_from_all_over_their_file(
    tmp_path: Path, tokenizer: Any, setting: str
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows, path = [{"prompt": "mia", "response": "tom"}] * 8, str(tmp_path / "a.parquet")
    settings = {setting: True, "streaming": True, "max_length": 16}
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    with pytest.raises(ConfigError, match=f"{setting} puts rows from all over a file together.* unset {setting} or st"):
        InstructionDataModule(path, tokenizer=tokenizer, **settings).setup()  # type: ignore[arg-type]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert batches_of(InstructionDataModule(path, tokenizer=tokenizer, **settings))  # type: ignore[arg-type]


def test_a_mixed_source_that_nothing_is_left_of_is_named(write: Any, tokenizer: Any) -> None:
    paths = [write("a.jsonl", PROMPTS), write("b.jsonl", [{"prompt": " "}] * 3)]
    for streaming, message in (
        (False, "nothing is left of the 3 rows of .*b.jsonl: 3 with an empty prompt"),
        (True, "nothing of .*b.jsonl is left to mix, as all its rows are dropped"),
    ):
        with pytest.raises(DataError, match=message):
            PromptDataModule(paths, tokenizer=tokenizer, mix=[1, 1], streaming=streaming).setup()


def test_what_is_dropped_is_counted_once_for_the_whole_stream(write: Any, tokenizer: Any, notices: list[str]) -> None:
    rows = [{"prompt": "the " * (1 + 30 * (n % 4 == 3))} for n in range(2 * BITE + 100)]
    module = PromptDataModule(
        write("a.jsonl", rows), tokenizer=tokenizer, max_length=16, max_new_tokens=4, batch_size=64, streaming=True
    )
    batches_of(module)
    dropped = len(rows) // 4
    assert [message.partition(" rows of ")[0] for message in notices] == [f"{dropped} of {len(rows):,}"]
    assert notices_end(notices, f"dropped: {dropped} too long (tokens + max_new_tokens 4 > max_length 16)")


def notices_end(notices: list[str], ending: str) -> bool:
    return [message.endswith(ending) for message in notices] == [True]


def test_characters_that_are_lost_are_counted_over_the_whole_stream(
    write: Any, story_tokenizer: Any, notices: list[str]
) -> None:
    rows = [{"prompt": "a # b"}] * (BITE + 10)
    name = write("a.jsonl", rows)
    PromptDataModule(name, tokenizer=story_tokenizer, max_length=64, max_new_tokens=4, streaming=True).setup()
    assert notices_end(notices, f"loses {BITE + 10} of them: '#' ×{BITE + 10}")


def test_what_a_template_leaves_out_is_remarked_once_for_the_whole_stream(
    write: Any, story_tokenizer: Any, notices: list[str]
) -> None:
    """Also where some rows of a bit are dropped."""
    tokenizer = copy.deepcopy(story_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}"
    )
    kept = [{"role": role, "content": f"the {role}"} for role in ("system", "user", "assistant")]
    rows = [{"messages": kept}] * (BITE + 10) + [{"messages": [*kept[:2], {"role": "assistant", "content": " "}]}]
    name = write("a.jsonl", rows)
    said = []
    for streaming in (False, True):
        InstructionDataModule(name, tokenizer=tokenizer, max_length=64, streaming=streaming).setup()
        said.append([message for message in notices if "chat template leaves out" in message][len(said) :])
    assert [message.partition(" conversations of ")[0] for message in said[0]] == [f"{len(rows)} of {len(rows)}"]
    assert said[1] == said[0]


def test_what_a_stream_drops_is_known_to_its_data_module(write: Any, tokenizer: Any) -> None:
    name = write("a.jsonl", [*PROMPTS, {"prompt": " ", "n": 0}])
    reasons = []
    for streaming in (False, True):
        module = PromptDataModule(name, tokenizer=tokenizer, streaming=streaming)
        batches_of(module)
        reasons.append([(dropped.total, dict(dropped.reasons)) for dropped in module.dropped])
    assert reasons[0] == reasons[1] == [(41, {"with an empty prompt": 1})]


def test_several_streams_are_balanced_by_the_lengths_that_are_known(
    write: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "mia", "response": "the " * (n + 1)} for n in range(20)]
    names = [write("a.jsonl", rows), write("b.jsonl", rows)]
    module = InstructionDataModule(names, tokenizer=tokenizer, balance=True, streaming=True)
    module.setup()
    monkeypatch.setattr(StreamedDataset, "__getitem__", None)
    assert sorted(module.train_dataloader().sampler) == list(range(40))


@pytest.mark.parametrize("mix", [None, [1.0, 1.0]])
def test_streamed_responses_of_one_label_alone_are_refused(write: Any, tokenizer: Any, mix: Any) -> None:
    rows = [{"prompt": f"mia visits {n}", "completion": "the ice", "label": True} for n in range(4)]
    names = [write("a.jsonl", rows), write("b.jsonl", rows[:2])]
    for streaming in (False, True):
        module = UnpairedDataModule(names, tokenizer=tokenizer, mix=mix, streaming=streaming)
        with pytest.raises(DataError, match="of both labels are needed, but .* has 6 desirable and 0 undesirable ones"):
            module.setup()
    names[1] = write("b.jsonl", [{**rows[0], "label": False}])
    UnpairedDataModule(names, tokenizer=tokenizer, mix=mix, streaming=True).setup()


def test_ids_that_occur_again_do_not_hide_what_is_wrong_with_a_row(write: Any, tokenizer: Any) -> None:
    lines = ['{"id": 1, "prompt": "mia"}', "{broken", '{"id": 1, "prompt": "tom"}']
    with pytest.raises(DataError, match=r"1 problem in .*\n.*jsonl:2: not valid JSON"):
        PromptDataModule(write("a.jsonl", "\n".join(lines)), tokenizer=tokenizer, streaming=True).setup()


def test_nothing_that_is_left_is_an_error(write: Any, tokenizer: Any) -> None:
    name = write("a.jsonl", [{"prompt": " "}] * 3)
    with pytest.raises(DataError, match=r"nothing is left of the 3 rows of .*: 3 with an empty prompt"):
        PromptDataModule(name, tokenizer=tokenizer, streaming=True).setup()


def test_all_problems_come_at_once_with_their_lines(write: Any, tokenizer: Any) -> None:
    name = write("a.jsonl", b'{"prompt": "mia"}\n{broken\n\n{"prompt": "\xff"}\n{"text": 1}\n')
    with pytest.raises(
        DataError, match=r"(?s)3 problems.*jsonl:2: not valid JSON.*jsonl:4: is not utf-8: byte 0xff.*jsonl:5: no key"
    ):
        PromptDataModule(name, tokenizer=tokenizer, streaming=True).setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch_of_a_stream(write: Any, tokenizer: Any, workers: int) -> None:
    name = write("a.jsonl", PROMPTS)

    def loader() -> ResumableLoader:
        module = PromptDataModule(name, tokenizer=tokenizer, batch_size=3, streaming=True, num_workers=workers)
        return ResumableLoader(module.train_dataloader())

    first = loader()
    batches: Iterator[Any] = iter(first)
    done = [next(batches)["index"] for _ in range(4)]
    position = first.position(finished=True)
    rest = [batch["index"] for batch in batches]
    again = loader()
    again.resume_at(position)
    assert [batch["index"] for batch in again] == rest
    assert len({index for batch in (*done, *rest) for index in batch}) == 39


def test_row_groups_of_a_parquet_file_are_shuffled_every_row_is_there_and_epochs_differ(
    tmp_path: Path, tokenizer: Any
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(PROMPTS), path, row_group_size=4)
    module = PromptDataModule(path, tokenizer=tokenizer, batch_size=4, streaming=True)
    order = [n for batch in batches_of(module) for n in batch["fields"]["n"]]
    assert sorted(order) == list(range(40))
    assert len({n // 4 for n in order[:16]}) == 4
    module._epoch = lambda: 1  # type: ignore[method-assign]
    assert [n for batch in batches_of(module) for n in batch["fields"]["n"]] != order


def test_a_file_that_is_changed_under_a_stream_ends_the_run(write: Any, tokenizer: Any) -> None:
    name = write("a.jsonl", PROMPTS)
    module = PromptDataModule(name, tokenizer=tokenizer, streaming=True)
    module.setup()
    write("a.jsonl", PROMPTS[::-1])
    with pytest.raises(DataError, match=r"a.jsonl was changed while it was streamed: start again"):
        batches_of(module)


def test_a_stream_can_be_sent_to_a_worker_process(write: Any, tokenizer: Any) -> None:
    module = PromptDataModule(write("a.jsonl", PROMPTS), tokenizer=tokenizer, streaming=True)
    dataset = module.train_dataloader().dataset
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "prompt\nx\n", {}, "csv cannot be streamed, only jsonl, lines, labelled_lines, parquet, arrow"),
        ("a.json", "[]", {}, "json cannot be streamed, only jsonl"),
        ("a.jsonl.gz", b"", {}, "a gzipped file cannot be streamed: unpack it"),
        ("a.jsonl", " \n", {}, "the file is empty"),
        ("a.txt", "x", {"encoding": "utf-16"}, "utf-16 cannot be streamed, as its lines do not end with one byte"),
        ("a.txt", "x", {"encoding": "utf-9"}, "unknown text encoding 'utf-9'"),
        ("none.jsonl", None, {}, "no such file"),
    ],
)
def test_what_cannot_be_streamed_is_named(
    write: Any, tmp_path: Path, tokenizer: Any, name: str, content: Any, options: Any, message: str
) -> None:
    path = str(tmp_path / name) if content is None else write(name, content)
    with pytest.raises(DataError, match=message):
        PromptDataModule(path, tokenizer=tokenizer, streaming=True, **options).setup()


def test_settings_that_need_all_rows_are_refused(write: Any, tokenizer: Any) -> None:
    name = write("a.txt", "1 the soup .\n0 the ice .\n")
    with pytest.raises(ConfigError, match="first_words .* streaming=false"):
        PromptDataModule(name, tokenizer=tokenizer, first_words=2, streaming=True).setup()
    with pytest.raises(ConfigError, match="pairing=labels .* streaming=false"):
        PreferenceDataModule(name, tokenizer=tokenizer, pairing="labels", streaming=True).setup()


def test_lines_are_found_again_in_any_encoding_with_one_byte_for_their_end(write: Any) -> None:
    name = write("a.txt", "café\n\n1 naïf\n".encode("latin-1"))
    source = open_source(name, Manner("lines", "latin-1"))
    assert [source[index] for index in (1, 0)] == read_rows(name, "lines", "latin-1")[::-1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf8", "UTF-8", "utf-8-sig"])
def test_a_byte_order_mark_is_skipped_whatever_the_encoding_is_called(write: Any, encoding: str) -> None:
    name = write("a.jsonl", '\ufeff{"a": 1}\n{"a": 2}\n')
    rows = [row for _, row in open_source(name, Manner(encoding=encoding)).good_rows(Problems(name))]
    assert rows == read_rows(name, encoding=encoding)
    assert [row.fields for row in rows] == [{"a": 1}, {"a": 2}]


def test_real_questions_stream_as_they_are_read(shared: Any) -> None:
    name = str(shared / "data/gsm8k_train.jsonl")
    source, rows = open_source(name, Manner()), read_rows(name)
    assert len(source) == len(rows)
    assert all(source[index] == rows[index] for index in range(0, len(rows), 97))


MEMORY = """
import sys
from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.data.task import build_tokenizer

def peak():
    # of this program alone: getrusage begins with the peak of the process that started it
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024

module = InstructionDataModule(sys.argv[1], tokenizer=build_tokenizer(), streaming=sys.argv[2] == "stream")
before = peak()
batches = module.train_dataloader()
for _, batch in zip(range(50), batches):
    pass
print(peak() - before)
"""


@pytest.mark.slow
def test_a_stream_holds_a_fraction_of_its_file(write: Any) -> None:
    rows = [{"prompt": f"mia visits {n}", "response": "the soup is warm . " * 50} for n in range(40_000)]
    name = write("a.jsonl", rows)
    size = Path(name).stat().st_size / 2**20
    grown = {}
    for how in ("stream", "memory"):
        done = subprocess.run([sys.executable, "-c", MEMORY, name, how], capture_output=True, text=True, check=True)
        grown[how] = float(done.stdout.splitlines()[-1])
    print(f"file {size:.0f} MiB, peak memory grown by MiB: {grown}")
    assert 0 < grown["stream"] < grown["memory"] / 4
    assert grown["memory"] > size
