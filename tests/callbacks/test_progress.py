from __future__ import annotations

import copy
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_hybrid.callbacks import PhaseProgressBar
from lightning_hybrid.modules.phases import Phases


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).square().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Phased(Plain):
    def __init__(self, fails=False):
        super().__init__()
        self.phases, self.fails = Phases(), fails

    def training_step(self, batch, batch_idx):
        with self.phases("rollout"):
            pass
        with self.phases("update"):
            if self.fails:
                raise ValueError("no update")
            return super().training_step(batch, batch_idx)


class Watched(PhaseProgressBar):
    """Keeps what the bar showed after each batch."""

    shown: list[tuple[int, int | None]]

    def on_train_batch_end(self, *arguments, **keywords):
        super().on_train_batch_end(*arguments, **keywords)
        self.shown.append((self.train_progress_bar.n, self.train_progress_bar.total))


def fit(module, bar, tmp_path, batches=3, ckpt_path=None, **settings):
    bar.shown = []
    rows = torch.utils.data.DataLoader(torch.ones(2 * batches, 2), batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[bar],
        logger=CSVLogger(tmp_path),
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, rows, rows, ckpt_path=ckpt_path)
    return trainer


def test_the_bar_names_stage_and_phase_and_shows_metrics_without_the_version(tmp_path, capsys):
    fit(Phased(), Watched("3/3 ppo"), tmp_path, max_steps=3, max_epochs=-1)
    out = capsys.readouterr().out
    assert "3/3 ppo · rollout: " in out
    assert "3/3 ppo · update: " in out
    assert "3/3 ppo · validation" in out
    assert "loss=" in out
    assert "v_num" not in out
    assert out.rstrip().splitlines()[-1].rpartition("\r")[2].startswith("3/3 ppo: 100%")


@pytest.mark.parametrize(
    "limits", [{"max_steps": 5, "max_epochs": -1}, {"max_steps": 5}, {"max_steps": 5, "max_epochs": 9}]
)
def test_the_bar_counts_the_steps_of_the_run_and_not_of_the_epoch(tmp_path, limits):
    bar = Watched("1/3 sft")
    fit(Plain(), bar, tmp_path, **limits)
    assert bar.shown == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_epochs_that_end_before_the_steps_limit_the_bar(tmp_path):
    bar = Watched("sft")
    fit(Plain(), bar, tmp_path, max_epochs=1, max_steps=100)
    assert bar.shown == [(1, 3), (2, 3), (3, 3)]


def test_accumulated_batches_move_the_bar_once(tmp_path):
    bar = Watched("sft")
    fit(Plain(), bar, tmp_path, batches=4, max_epochs=1, accumulate_grad_batches=2)
    assert bar.shown == [(0, 2), (1, 2), (1, 2), (2, 2)]


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    first = fit(Plain(), Watched("sft"), tmp_path, max_steps=2, max_epochs=-1)
    first.save_checkpoint(tmp_path / "two.ckpt")
    bar = Watched("sft")
    fit(Plain(), bar, tmp_path, ckpt_path=tmp_path / "two.ckpt", max_steps=4, max_epochs=-1)
    assert bar.shown == [(3, 4), (4, 4)]
    assert bar.train_progress_bar.initial == 2


def test_no_listener_is_left_after_training(tmp_path):
    module = Phased()
    fit(module, Watched("ppo"), tmp_path, max_steps=1, max_epochs=-1)
    assert module.phases.listeners == []
    copy.deepcopy(module)


def test_no_listener_is_left_after_an_exception(tmp_path):
    module = Phased(fails=True)
    with pytest.raises(ValueError, match="no update"):
        fit(module, Watched("ppo"), tmp_path, max_steps=1, max_epochs=-1)
    assert module.phases.listeners == []


def test_a_refresh_rate_of_zero_shows_nothing(tmp_path, capsys):
    fit(Phased(), Watched("ppo", refresh_rate=0), tmp_path, max_steps=1, max_epochs=-1)
    assert "ppo" not in capsys.readouterr().out


class Scored(Plain):
    def training_step(self, batch, batch_idx):
        self.log_dict({"score": 1.25, "kl": 0.5}, prog_bar=True, logger=False)
        return self.layer(batch["attention_mask"]).mean()

    def validation_step(self, batch, batch_idx):
        """There is nothing to say."""


def test_the_bar_shows_reward_kl_speed_and_the_time_that_is_left(tmp_path, capsys):
    bar = Watched("ppo")
    bar.shown = []
    batches = torch.utils.data.DataLoader([{"attention_mask": torch.ones(2)}] * 6, batch_size=2)
    trainer = L.Trainer(accelerator="cpu", callbacks=[bar], logger=False, max_steps=3, enable_checkpointing=False)
    trainer.fit(Scored(), batches)
    last = capsys.readouterr().out.rpartition("\r")[2]
    assert re.search(r"3/3 \[\d\d:\d\d, 00:00 left, .*it/s, reward=1.250, kl=0.500, tok/s=\d+\]", last), last


def test_the_time_left_is_that_of_the_run_and_not_of_the_epoch(tmp_path):
    seen = []

    class Timed(Watched):
        def on_train_batch_end(self, *arguments, **keywords):
            super().on_train_batch_end(*arguments, **keywords)
            shown = self.train_progress_bar.format_dict
            shown["elapsed"] = 10.0  # as if
            seen.append(str(type(self.train_progress_bar).format_meter(**shown)))

    fit(Plain(), Timed("sft"), tmp_path, max_steps=6, max_epochs=-1)
    assert "00:50 left" in seen[0]  # 1 of 6 steps in 10 s
    assert "00:10 left" in seen[2]  # half of them, at the end of the first epoch
