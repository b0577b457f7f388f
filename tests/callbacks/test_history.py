from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_hybrid.callbacks import Checkpoints, History, MetricsEvents, MetricsFile, SampleLog
from lightning_hybrid.callbacks.history import MetricsWriter
from tests.callbacks.test_samples import Writer

ROWS = 10


class Logged(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        if self.global_step >= 3:
            self.log("late", 1.0)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch).square().mean())

    def on_train_epoch_end(self) -> None:
        self.log("epochs", float(self.current_epoch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(Exception):
    pass


class Kill(L.Callback):
    """End the run in the batch after `step` steps; what loggers hold in memory is lost, as after a kill."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.experiment.metrics = []
            raise Killed


def fit(
    folder: Path, *more: L.Callback, resume: Path | str | None = None, every: int | None = None, **arguments: Any
) -> L.Trainer:
    settings: dict[str, Any] = {"max_epochs": 3, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=MetricsFile(folder),
        log_every_n_steps=1,
        callbacks=[History(), *more, Checkpoints(folder / "checkpoints", every, keep=20)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **(settings | arguments),
    )
    rows = torch.utils.data.DataLoader(torch.arange(2.0 * ROWS).view(ROWS, 2) / ROWS, batch_size=2)
    trainer.fit(Logged(), rows, rows, ckpt_path=resume)
    return trainer


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run went through without a break: three epochs of five batches, two validations in each."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, every=1)
    return folder


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 10, 13])
def test_a_run_resumed_at_any_step_has_the_rows_of_one_without_a_break(step: int, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, Kill(step + 1), every=step)
    resumed = tmp_path / "checkpoints" / f"step={step:06d}.ckpt"
    trainer = fit(tmp_path, resume=resumed, every=step)
    assert trainer.global_step == 15
    ours, expected = table(tmp_path), table(whole)
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    names = set(expected[0]) - {"loss", "val/loss"}  # this loader begins an epoch anew, so that losses differ
    assert [{n: row[n] for n in names} for row in ours] == [{n: row[n] for n in names} for row in expected]
    assert [bool(row["val/loss"]) for row in ours] == [bool(row["val/loss"]) for row in expected]


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(whole: Path, tmp_path: Path) -> None:
    fit(tmp_path, max_steps=7, max_epochs=-1)
    trainer = fit(tmp_path, resume="last")
    assert trainer.global_step == 15
    assert trainer.current_epoch == 3
    # the shorter run's end in the middle of an epoch was logged as an epoch's
    assert [row["step"] for row in table(tmp_path) if row["loss"]] == [str(i) for i in range(15)]


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path) -> None:
    fit(tmp_path)
    before = (tmp_path / "metrics.csv").read_bytes()
    fit(tmp_path, resume="last")
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_run_that_starts_anew_drops_what_an_earlier_one_logged(tmp_path: Path) -> None:
    fit(tmp_path, max_epochs=2)
    fit(tmp_path, max_epochs=1)
    assert {row["epoch"] for row in table(tmp_path)} == {"0"}


def writer(folder: Path, content: str) -> MetricsWriter:
    (folder / "metrics.csv").write_text(content)
    return MetricsWriter(str(folder))


def test_a_line_that_was_written_in_part_is_dropped(tmp_path: Path) -> None:
    log = writer(tmp_path, "loss,step\r\n1.0,0\r\n2.0,1\r\n3.0,12")
    log.rewind(20)
    assert [row["step"] for row in table(tmp_path)] == ["0", "1"]


def test_columns_stay_and_new_ones_join_them(tmp_path: Path) -> None:
    log = writer(tmp_path, "loss,step,val\r\n1.0,0,\r\n2.0,1,3.0\r\n")
    log.rewind(1)
    log.log_metrics({"extra": 5.0}, 1)
    log.save()
    expected = {"extra": "5.0", "loss": "", "step": "1", "val": ""}
    assert table(tmp_path) == [{"extra": "", "loss": "1.0", "step": "0", "val": ""}, expected]


@pytest.mark.parametrize("content", ["", "loss,st", "loss,step\r\n", "1.0,2.0\r\n3.0,4.0\r\n"])
def test_a_file_without_a_whole_row_begins_anew(content: str, tmp_path: Path) -> None:
    log = writer(tmp_path, content)
    log.rewind(5)
    assert not (tmp_path / "metrics.csv").exists()
    log.log_metrics({"loss": 1.0}, 5)
    log.save()
    assert table(tmp_path) == [{"loss": "1.0", "step": "5"}]


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at in (None, 3):
        log = MetricsEvents(tmp_path)
        if resumed_at is not None:
            log.rewind(resumed_at)
        for step in range(resumed_at or 0, 5):
            log.log_metrics({"loss": float(step + 10 * (resumed_at or 0))}, step)
        log.save()
        log.experiment.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 33.0),
        (4, 34.0),
    ]


def test_samples_after_the_checkpoint_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1, "prompt": "a"}\n{"step": 2}\n{"step": 3}\n{"step": 4, "pro')
    log = SampleLog(path, rows=1, every=1)

    def trainer(**arguments: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", **quiet, **arguments)

    rows = torch.utils.data.DataLoader(torch.ones(3, 1))
    first = trainer(max_steps=2, enable_checkpointing=False)
    first.fit(Writer(), rows)
    first.save_checkpoint(tmp_path / "two.ckpt")
    trainer(max_steps=3, callbacks=[log], enable_checkpointing=False).fit(
        Writer(), rows, ckpt_path=tmp_path / "two.ckpt", weights_only=False
    )
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"step": 1, "prompt": "a"}', '{"step": 2}']
    assert len(lines) == 3
    assert lines[2].startswith('{"step": 3, "prompt": "mia')
