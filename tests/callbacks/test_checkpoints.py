from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_hybrid.callbacks import Checkpoints
from lightning_hybrid.callbacks.links import replace_link
from tests.helpers import GAN, Regression, quiet_trainer, random_batches


class Counting(Checkpoints):
    """Keeps the steps at which it wrote."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.written: list[int] = []

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.written.append(trainer.global_step)
        super()._save_checkpoint(trainer, filepath)


def fit(keep: Checkpoints, ckpt_path: Any = None, module: Any = None, **arguments: Any) -> L.Trainer:
    trainer = quiet_trainer("hybrid_deepspeed", callbacks=[keep], enable_checkpointing=True, **arguments)
    trainer.fit(module or Regression(), random_batches(), random_batches(seed=2), ckpt_path=ckpt_path)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_under_names_that_sort_and_linked_as_last(tmp_path: Path) -> None:
    keep = Counting(tmp_path, 2, 2)
    fit(keep, max_steps=9, max_epochs=-1)
    assert names(tmp_path) == ["last.ckpt", "step=000008.ckpt", "step=000009.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "step=000009.ckpt"
    assert keep.written == [2, 4, 6, 8, 9]


def test_one_per_epoch_is_written_where_none_is_asked_for_and_none_twice(tmp_path: Path) -> None:
    keep = Counting(tmp_path)
    fit(keep, max_epochs=3, val_check_interval=2)
    assert keep.written == [6, 12, 18]


def test_modules_that_step_by_hand_are_written_alike(tmp_path: Path) -> None:
    keep = Counting(tmp_path, 4)
    fit(keep, max_epochs=1, module=GAN())
    assert keep.written == [4, 8, 12]


def test_a_resumed_run_writes_neither_its_own_start_nor_more_than_it_may_keep(tmp_path: Path) -> None:
    fit(Counting(tmp_path, 2, 2), max_steps=4, max_epochs=-1)
    again = Counting(tmp_path, 2, 2)
    fit(again, "last", max_steps=8, max_epochs=-1)
    assert again.written == [6, 8]
    assert names(tmp_path) == ["last.ckpt", "step=000006.ckpt", "step=000008.ckpt"]


def test_last_is_the_newest_complete_one_also_where_the_link_leads_nowhere(tmp_path: Path) -> None:
    fit(Counting(tmp_path, 2, 2), max_steps=4, max_epochs=-1)
    replace_link(tmp_path / "last.ckpt", "step=000099.ckpt")
    trainer = fit(Counting(tmp_path, 2, 2), "last", max_steps=5, max_epochs=-1)
    assert Path(str(trainer.ckpt_path)).name == "step=000004.ckpt"
    assert trainer.global_step == 5


def test_a_folder_that_older_versions_called_last_gives_way_to_the_link(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "weights").touch()
    replace_link(tmp_path / "last.ckpt", "step=000001.ckpt")
    assert os.readlink(tmp_path / "last.ckpt") == "step=000001.ckpt"
    assert names(tmp_path) == ["last.ckpt"]


def test_there_is_a_link_at_every_moment(tmp_path: Path) -> None:
    link, missing, done = tmp_path / "last.ckpt", [], threading.Event()
    replace_link(link, "0")

    def watch() -> None:
        while not done.is_set():
            if not link.is_symlink():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(300):
        replace_link(link, str(i))
    done.set()
    watcher.join()
    assert missing == []


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_file_system_without_links_keeps_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no symbolic links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.warns(UserWarning, match="no link .*last.ckpt to the last checkpoint: no symbolic links here"):
        fit(Counting(tmp_path, 2, 2), max_steps=2, max_epochs=-1)
    assert names(tmp_path) == ["step=000002.ckpt"]


def test_it_is_lightnings_own_kind_of_callback(tmp_path: Path) -> None:
    keep = Checkpoints(tmp_path)
    assert isinstance(keep, ModelCheckpoint)
    trainer = fit(keep, max_epochs=1)
    assert Path(trainer.checkpoint_callback.best_model_path).name == "step=000006.ckpt"  # type: ignore[union-attr]
