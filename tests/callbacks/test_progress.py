from __future__ import annotations

import copy

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
