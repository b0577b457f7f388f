from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_hybrid.data import InstructionDataModule, PromptDataModule
from lightning_hybrid.data import fingerprint as fingerprints
from lightning_hybrid.data.fingerprint import Files, differences
from lightning_hybrid.errors import DataError

ROWS = [{"prompt": f"mia visits the {place} .", "response": "the soup is warm ."} for place in ("farm", "hotel")]


def read(path: Any, tokenizer: Any, **arguments: Any) -> InstructionDataModule:
    data = InstructionDataModule(path, tokenizer=tokenizer, **arguments)
    data.setup("fit")
    return data


def test_the_same_data_is_gone_on_with_wherever_it_stands(write: Any, tokenizer: Any, tmp_path: Path) -> None:
    state = read(write("a.jsonl", ROWS), tokenizer).state_dict()
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "b.jsonl"
    moved.write_bytes((tmp_path / "a.jsonl").read_bytes())
    read(str(moved), tokenizer, batch_size=2, num_workers=1).load_state_dict(state)


def test_the_same_chat_template_is_gone_on_with_wherever_it_stands(write: Any, tmp_path: Path) -> None:
    from lightning_hybrid.data.task import build_tokenizer

    path, states = write("a.jsonl", ROWS), []
    for name, template in (("a.jinja", "{{ messages }}"), ("b.jinja", "{{ messages }}"), ("c.jinja", "{{ 0 }}")):
        (tmp_path / name).write_text(template)
        states.append(read(path, build_tokenizer(), template=str(tmp_path / name)))
    states[1].load_state_dict(states[0].state_dict())
    with pytest.raises(DataError, match="chat_template: '"):
        states[2].load_state_dict(states[0].state_dict())


def test_a_changed_file_is_named_with_what_differs_and_the_fix(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", ROWS)
    state = read(path, tokenizer).state_dict()
    write("a.jsonl", ROWS[:1])
    with pytest.raises(DataError) as raised:
        read(path, tokenizer).load_state_dict(state)
    lines = str(raised.value).splitlines()
    assert lines[0] == "the data is not what this run began with:"
    figures = r"[\d,]+ bytes, {} rows, sha256 \w{{12}}"
    changed = rf"  .*a\.jsonl: {figures.format(1)}; in the checkpoint: {figures.format(2)}"
    assert re.fullmatch(changed, lines[1])
    assert lines[2] == "put the data back as it was, or start anew without ckpt_path"


def test_a_single_byte_counts(write: Any, tokenizer: Any) -> None:
    path = write("a.txt", "the soup is warm .\n")
    state = read(path, tokenizer, prompt_key=None, response_key="text").state_dict()
    write("a.txt", "the soup is warm !\n")
    with pytest.raises(DataError, match=r"a\.txt: 19 bytes, 1 rows.*in the checkpoint: 19 bytes, 1 rows"):
        read(path, tokenizer, prompt_key=None, response_key="text").load_state_dict(state)


@pytest.mark.parametrize(
    ("argument", "value", "before"),
    [("limit", 1, None), ("max_length", 32, None), ("seed", 3, 0), ("bos", False, True)],
)
def test_an_argument_that_shapes_the_examples_counts(
    argument: str, value: Any, before: Any, write: Any, tokenizer: Any
) -> None:
    path = write("a.jsonl", ROWS)
    state = read(path, tokenizer).state_dict()
    with pytest.raises(DataError, match=f"{argument}: {value}; in the checkpoint: {before}"):
        read(path, tokenizer, **{argument: value}).load_state_dict(state)


def test_files_more_or_less_are_listed(write: Any, tokenizer: Any) -> None:
    one, two = write("a.jsonl", ROWS), write("b.jsonl", ROWS[:1])
    state = read([one, two], tokenizer).state_dict()
    with pytest.raises(DataError, match=rf"files: {re.escape(one)}; in the checkpoint: .*a\.jsonl, .*b\.jsonl"):
        read(one, tokenizer).load_state_dict(state)


def test_validation_files_count_too(write: Any, tokenizer: Any) -> None:
    one, two = write("a.jsonl", ROWS), write("b.jsonl", ROWS[:1])
    state = read(one, tokenizer, validation_path=two).state_dict()
    write("b.jsonl", ROWS[1:])
    with pytest.raises(DataError, match=r"b\.jsonl: "):
        read(one, tokenizer, validation_path=two).load_state_dict(state)


def test_a_file_that_is_changed_while_it_is_read_is_refused(
    write: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.jsonl", ROWS)
    data = InstructionDataModule(path, tokenizer=tokenizer)
    examples = data._examples

    def slowly(*arguments: Any) -> Any:
        Path(path).write_bytes(Path(path).read_bytes() * 2)
        return examples(*arguments)

    monkeypatch.setattr(data, "_examples", slowly)
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read: start again"):
        data.setup("fit")


def test_a_file_that_is_changed_under_a_running_job_does_not_touch_it(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", ROWS)
    data = read(path, tokenizer)
    os.truncate(path, 0)
    assert len(next(iter(data.train_dataloader()))["input_ids"]) == 2
    assert data.state_dict()["files"][0]["rows"] == 2


def test_large_files_are_digested_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcdefg")
    whole = Files([str(path)]).read({str(path): 1})
    monkeypatch.setattr(fingerprints, "CHUNK", 3)
    assert (
        differences(
            {"files": Files([str(path)]).read({str(path): 1}), "arguments": {}}, {"files": whole, "arguments": {}}, ""
        )
        == []
    )


def rank_reads(folder: str) -> None:
    """Entry point of a rank: reads its own file, as on machines whose copies differ."""
    from lightning_hybrid.data.task import build_tokenizer
    from tests.modules.test_ppo import module

    path = Path(folder) / f"{os.environ['RANK']}.jsonl"
    data = PromptDataModule(str(path), tokenizer=build_tokenizer(), batch_size=1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(strategy="hybrid_deepspeed", accelerator="cpu", devices=2, max_steps=1, logger=False, **quiet)
    try:
        trainer.fit(module(), datamodule=data)
    except DataError as error:
        print(error.on_every_rank, error)


@pytest.mark.slow
def test_ranks_that_have_read_different_data_all_stop_and_say_which(run_ranks: Any, write: Any, tmp_path: Path) -> None:
    write("0.jsonl", ROWS)
    write("1.jsonl", ROWS[:1] * 2)
    for said in run_ranks(rank_reads, 2, str(tmp_path)):
        assert "True the ranks have read different data:" in said
        assert re.search(r"rank 1: .*1\.jsonl: .*; on rank 0: ", said)
        assert "give every machine the same files" in said


@pytest.mark.slow
def test_a_rank_that_cannot_read_stops_the_others(run_ranks: Any, write: Any, tmp_path: Path) -> None:
    write("0.jsonl", ROWS)
    for said in run_ranks(rank_reads, 2, str(tmp_path)):
        assert re.search(r"(?s)rank 1: .*1\.jsonl: no such file", said)
