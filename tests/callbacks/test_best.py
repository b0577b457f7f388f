"""The best checkpoint by any metric: kept beside the newest, found again, and never one without a value."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_hybrid.assemble import resolve_checkpoint
from lightning_hybrid.callbacks import Checkpoints
from lightning_hybrid.callbacks.best import BestByMetric, best_checkpoint, read_best
from lightning_hybrid.checkpoint import Checkpoint
from lightning_hybrid.config import SFTRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import CheckpointError, ConfigError
from tests.helpers import Regression, quiet_trainer, random_batches


class Scored(Regression):
    """Logs given scores, one for each validation, and one of training for each batch."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.log("train_score", self.scores[self.trainer.global_step // 2 % len(self.scores)])
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log("val/score", self.scores[(self.trainer.global_step // 2 - 1) % len(self.scores)])


def fit(
    folder: Path, scores: list[float], metric: str | None = "val/score", mode: Any = "max", every: int = 2, **more: Any
) -> L.Trainer:
    """Six batches an epoch, a validation after every second one."""
    ckpt_path = more.pop("ckpt_path", None)
    arguments = {"max_steps": 2 * len(scores), "max_epochs": -1, "val_check_interval": 2} | more
    keep = Checkpoints(folder, every, 1, metric, mode)
    trainer = quiet_trainer("hybrid_deepspeed", callbacks=[keep], enable_checkpointing=True, **arguments)
    trainer.fit(Scored(scores), random_batches(), random_batches(seed=2), ckpt_path=ckpt_path)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("metric", "mode"), [("val/score", "max"), ("val/loss", "min"), ("loss", "min"), ("val/rewards/accuracy", "max")]
)
def test_of_a_loss_the_smallest_is_the_best_unless_told_otherwise(metric: str, mode: str) -> None:
    assert BestByMetric(metric).mode == mode
    assert BestByMetric(metric, "max").mode == "max"


def test_the_best_is_kept_beside_the_newest_with_its_value(tmp_path: Path) -> None:
    trainer = fit(tmp_path, [1.0, 3.0, 2.0, 0.5, 3.0])
    assert names(tmp_path) == ["best.ckpt", "best.json", "last.ckpt", "step=000004.ckpt", "step=000010.ckpt"]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "step=000004.ckpt",
        "metric": "val/score",
        "mode": "max",
        "value": 3.0,
        "step": 4,
    }
    assert os.readlink(tmp_path / "best.ckpt") == "step=000004.ckpt"
    assert Path(trainer.checkpoint_callback.best_model_path).name == "step=000004.ckpt"  # type: ignore[union-attr]
    assert Checkpoint(tmp_path / "best.ckpt").manifest["global_step"] == 4


def test_a_better_one_takes_its_place_and_the_former_goes(tmp_path: Path) -> None:
    fit(tmp_path, [3.0, 2.0, 1.0, 1.5], mode="min")
    assert names(tmp_path) == ["best.ckpt", "best.json", "last.ckpt", "step=000006.ckpt", "step=000008.ckpt"]


def test_it_is_written_where_no_checkpoint_was_due(tmp_path: Path) -> None:
    fit(tmp_path, [1.0, 3.0, 2.0, 1.0], every=100)
    assert best_checkpoint(tmp_path).name == "step=000004.ckpt"
    assert names(tmp_path)[-2:] == ["step=000004.ckpt", "step=000008.ckpt"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore")  # other warnings are raised again as errors
def test_what_is_no_number_is_never_the_best(tmp_path: Path, wrong: float) -> None:
    with pytest.warns(UserWarning, match=rf"val/score is {wrong} after step [26]: such a checkpoint is never the best"):
        fit(tmp_path, [wrong, 1.0, wrong])
    assert best_checkpoint(tmp_path).name == "step=000004.ckpt"


def test_a_metric_of_training_is_judged_where_a_checkpoint_is_due(tmp_path: Path) -> None:
    fit(tmp_path, [1.0, 5.0, 2.0], "train_score", limit_val_batches=0)
    best = read_best(tmp_path)
    assert best is not None
    assert (best.value, best.step) == (5.0, 4)


def test_a_metric_that_nobody_logs_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"best_metric = 'val/scores' .* step 2; logged are: .*train_score, .*val/score"
    ):
        fit(tmp_path, [1.0, 2.0], "val/scores")
    with pytest.raises(ConfigError, match=r"best_metric = 'val/score' is logged by validation, and there is none"):
        fit(tmp_path, [1.0, 2.0], limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"best_metric = 'accuracy' .* logged are: .*train_score"):
        fit(tmp_path, [1.0, 2.0], "accuracy", limit_val_batches=0)


@pytest.mark.filterwarnings("ignore")  # other warnings are raised again as errors
def test_a_run_too_short_for_a_validation_says_that_there_is_no_best(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no checkpoint is the best: callbacks.best_metric = 'val/score'"):
        fit(tmp_path, [1.0], max_steps=1)
    assert names(tmp_path) == ["last.ckpt", "step=000001.ckpt"]


def test_a_resumed_run_remembers_the_best_and_keeps_it(tmp_path: Path) -> None:
    scores = [1.0, 3.0, 2.0, 2.5, 4.0]
    fit(tmp_path, scores, max_steps=6)
    fit(tmp_path, scores, max_steps=8, ckpt_path="last")
    assert names(tmp_path) == ["best.ckpt", "best.json", "last.ckpt", "step=000004.ckpt", "step=000008.ckpt"]
    fit(tmp_path, scores, max_steps=10, ckpt_path="last")
    assert names(tmp_path) == ["best.ckpt", "best.json", "last.ckpt", "step=000010.ckpt"]


def test_the_best_of_a_branch_that_was_left_is_forgotten(tmp_path: Path) -> None:
    fit(tmp_path, [1.0, 2.0, 3.0], max_steps=4)
    started = tmp_path / "step=000004.ckpt"
    kept = started.rename(tmp_path / "kept.ckpt")
    fit(tmp_path, [1.0, 2.0, 3.0], max_steps=6, ckpt_path=str(kept))
    fit(tmp_path, [0.0, 0.0, 0.5, 0.25], max_steps=8, ckpt_path=str(kept))
    best = read_best(tmp_path)
    assert best is not None
    assert (best.value, best.step) == (0.5, 6)


def test_a_run_that_starts_anew_forgets_the_best_of_the_one_before(tmp_path: Path) -> None:
    fit(tmp_path, [9.0, 1.0])
    fit(tmp_path, [1.0, 2.0])
    best = read_best(tmp_path)
    assert best is not None
    assert (best.value, best.step) == (2.0, 4)


def test_another_metric_begins_anew(tmp_path: Path) -> None:
    fit(tmp_path, [9.0, 1.0, 1.0], max_steps=4)
    fit(tmp_path, [9.0, 1.0, 1.0], "val_loss", "min", max_steps=6, ckpt_path="last")
    best = read_best(tmp_path)
    assert best is not None
    assert (best.metric, best.step) == ("val_loss", 6)


def test_best_is_found_by_its_name_also_where_the_link_is_gone(tmp_path: Path) -> None:
    fit(tmp_path / "checkpoints", [1.0, 3.0, 2.0])
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    run = compose_run("sft", SFTRun, ["model.path=m", "data.path=d", f"output_dir={tmp_path}", "ckpt_path=best"])
    assert resolve_checkpoint(run) == tmp_path / "checkpoints" / "step=000004.ckpt"


def test_a_best_that_is_not_there_is_an_error_that_offers_another(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no best checkpoint in .* needs callbacks.best_metric"):
        best_checkpoint(tmp_path)
    fit(tmp_path, [1.0, 3.0, 2.0])
    (tmp_path / "step=000004.ckpt").rename(tmp_path.parent / "elsewhere.ckpt")
    with pytest.raises(CheckpointError, match=r"step=000004.ckpt', by val/score=3, is gone; .*step=000006.ckpt'"):
        best_checkpoint(tmp_path)
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match="best.json' is no record of the best checkpoint"):
        best_checkpoint(tmp_path)


def test_a_checkpoint_that_a_thread_writes_is_recorded_once_it_is_complete(tmp_path: Path) -> None:
    from lightning_hybrid import HybridDeepSpeedStrategy

    keep = Checkpoints(tmp_path, 2, 1, "val/score")
    strategy = HybridDeepSpeedStrategy(checkpoint={"asynchronous": True})
    arguments = {"max_steps": 6, "max_epochs": -1, "val_check_interval": 2, "enable_checkpointing": True}
    trainer = quiet_trainer(strategy, callbacks=[keep], **arguments)
    trainer.fit(Scored([1.0, 3.0, 2.0]), random_batches(), random_batches(seed=2))
    assert names(tmp_path) == ["best.ckpt", "best.json", "last.ckpt", "step=000004.ckpt", "step=000006.ckpt"]


def test_the_best_needs_checkpoints() -> None:
    overrides = ["model.path=m", "data.path=d", "callbacks.best_metric=val/loss", "trainer.enable_checkpointing=false"]
    with pytest.raises(ConfigError, match=r"callbacks.best_metric.*needs trainer.enable_checkpointing=true"):
        compose_run("sft", SFTRun, overrides)


@pytest.mark.parametrize("name", ["../elsewhere", ".", "..", "/etc", ""])
def test_a_record_that_names_a_folder_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    record = {"checkpoint": name, "metric": "val/score", "mode": "max", "value": 1.0, "step": 1}
    (tmp_path / "best.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="is no folder beside it; remove it"):
        read_best(tmp_path)
