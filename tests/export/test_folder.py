"""Which folders an export may replace: those that hold an earlier one as it was written, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import CheckpointError, ConfigError
from lightning_hybrid.export import export_model, reason_to_keep, refuse_to_replace
from tests.helpers import tiny_policy


def exported(folder: Path, seed: int = 0) -> dict[str, bytes]:
    export_model(tiny_policy(seed), folder, build_tokenizer())
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_replaces_its_own_earlier_export(tmp_path: Path) -> None:
    before = exported(tmp_path / "model")
    after = exported(tmp_path / "model", seed=1)
    assert before.keys() == after.keys()
    assert before["model.safetensors"] != after["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_exporting_the_same_model_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    assert exported(tmp_path / "one") == exported(tmp_path / "other")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), "it holds 'notes.txt'"),
        (lambda folder: (folder / "README.md").write_text("my own card"), "it holds 'README.md'"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"other weights"), "it holds 'model.safetensors'"),
        (lambda folder: (folder / "export.json").unlink(), "it is not empty and no export"),
        (lambda folder: (folder / "export.json").write_text("[]"), "it is not empty and no export"),
    ],
)
def test_what_was_added_or_changed_is_not_lost(tmp_path: Path, harm: Callable[[Path], object], reason: str) -> None:
    folder = tmp_path / "model"
    exported(folder)
    harm(folder)
    before = contents(folder)
    with pytest.raises(ConfigError, match=f"cannot export to '.*model': {reason}.*; nothing was touched"):
        refuse_to_replace(folder, reason_to_keep(folder))
    with pytest.raises(CheckpointError, match=reason):
        exported(folder, seed=1)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_downloaded_model_a_file_and_a_link_are_kept_and_an_empty_folder_is_not(tmp_path: Path) -> None:
    downloaded = tmp_path / "downloaded"
    tiny_policy().model.save_pretrained(downloaded)
    assert "it is not empty and no export" in str(reason_to_keep(downloaded))
    (tmp_path / "file").write_text("")
    assert reason_to_keep(tmp_path / "file") == "it is a file"
    (tmp_path / "link").symlink_to(downloaded)
    assert reason_to_keep(tmp_path / "link") == "it is a link"
    (tmp_path / "empty").mkdir()
    assert reason_to_keep(tmp_path / "empty") is None
    assert reason_to_keep(tmp_path / "new") is None


def test_an_export_that_fails_half_way_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = exported(tmp_path / "model")
    tokenizer = build_tokenizer()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_model(tiny_policy(seed=1), tmp_path / "model", tokenizer)
    assert contents(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
