"""Checkpoints written in the middle of something say that the run stands before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_hybrid.modules.ppo
import lightning_hybrid.strategy.checkpoint
from lightning_hybrid import HybridDeepSpeedStrategy
from lightning_hybrid.modules.update import PPOUpdate
from tests.checkpoint.runs import ppo, prompt_file, strategy, train
from tests.helpers import GAN, Regression, quiet_trainer, random_batches, weights_of


class Losses(L.Callback):
    """The loss of each batch, as it was computed; saves after some of them."""

    def __init__(self, folder: Path | None = None, save_after: tuple[int, ...] = ()) -> None:
        self.seen: list[tuple[int, int, float]] = []
        self.folder = folder
        self.save_after = save_after
        self.batches = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch_idx, float(outputs["loss"])))
        self.batches += 1
        if self.folder is not None and self.batches in self.save_after:
            trainer.save_checkpoint(self.folder / f"batch={self.batches}.ckpt")


class Noisy(Regression):
    """Draws from torch's global stream in every step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        batch[0][:, :5] += 0.1 * torch.randn(len(batch[0]), 5)
        return super().training_step(batch, batch_idx)


def shuffled() -> DataLoader[Any]:
    rows = torch.randn(28, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(rows), batch_size=4, shuffle=True)


def regress(
    losses: Losses, stage: int, resume: Path | None = None, data: Any = None, also: Any = None, **arguments: Any
) -> torch.Tensor:
    L.seed_everything(3, verbose=False)
    module = Noisy()
    arguments = {"accumulate_grad_batches": 3, "max_epochs": 3} | arguments
    trainer = quiet_trainer(
        HybridDeepSpeedStrategy(stage=stage), callbacks=[losses, *([also] if also else [])], **arguments
    )
    trainer.fit(module, data or shuffled(), ckpt_path=None if resume is None else str(resume))
    return weights_of(module)


def assert_goes_on(folder: Path, saved: int, after: int, stage: int = 2, **arguments: Any) -> None:
    """A run resumed from what was saved after some batches is the uninterrupted one, from batch ``after`` on."""
    whole, rest = Losses(folder, (saved,)), Losses()
    weights = regress(whole, stage, **arguments)
    resumed = regress(rest, stage, folder / f"batch={saved}.ckpt", **arguments)
    assert rest.seen == whole.seen[after:]
    assert torch.equal(resumed, weights)


# Seven batches per epoch, steps after 3, 6 and 7.
@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
@pytest.mark.parametrize(("saved", "goes_on_after"), [(5, 3), (6, 6), (7, 7), (8, 7), (13, 13), (16, 14), (18, 17)])
def test_an_accumulation_that_was_begun_is_done_again(
    tmp_path: Path, stage: int, saved: int, goes_on_after: int
) -> None:
    assert_goes_on(tmp_path, saved, goes_on_after, stage)


@pytest.mark.parametrize(("first", "then", "goes_on_after"), [(5, 7, 7), (8, 11, 10), (8, 13, 13), (8, 14, 14)])
def test_a_run_that_was_resumed_in_an_epoch_is_resumed_again(
    tmp_path: Path, first: int, then: int, goes_on_after: int
) -> None:
    whole, resumed, rest = Losses(tmp_path, (first,)), Losses(tmp_path, (then,)), Losses()
    weights = regress(whole, 2)
    begins = {5: 3, 8: 7}[first]
    resumed.batches = begins
    regress(resumed, 2, tmp_path / f"batch={first}.ckpt")
    assert resumed.seen == whole.seen[begins:]
    assert torch.equal(regress(rest, 2, tmp_path / f"batch={then}.ckpt"), weights)
    assert rest.seen == whole.seen[goes_on_after:]


@pytest.mark.parametrize(
    ("iteration", "phase"),
    [
        (4, "reward"),
        *(pytest.param(4, phase, marks=pytest.mark.slow) for phase in ("rollout", "experience")),
        *(pytest.param(1, phase, marks=pytest.mark.slow) for phase in ("rollout", "reward", "experience")),
    ],
)
def test_an_iteration_that_was_begun_is_done_again(tmp_path: Path, phase: str, iteration: int) -> None:
    data, target = prompt_file(tmp_path), tmp_path / "middle.ckpt"
    whole, weights = train(ppo(), data, 6, strategy(2))
    interrupted = ppo()

    def save(entered: str) -> None:
        if entered == phase and interrupted.global_step == iteration - 1:
            interrupted.trainer.save_checkpoint(target)
            raise KeyError("interrupted")

    interrupted.phases.listeners.append(save)
    with pytest.raises(KeyError, match="interrupted"):
        train(interrupted, data, 6, strategy(2))
    rest, resumed = train(ppo(), data, 6, strategy(2), resume=target)
    assert rest == {step: said for step, said in whole.items() if step >= iteration}
    assert torch.equal(resumed, weights)


def test_saving_between_the_steps_of_an_update_warns_that_they_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Saving(PPOUpdate):
        def _step(self, *arguments: Any) -> Any:
            result = super()._step(*arguments)
            self.module.trainer.save_checkpoint(tmp_path / "update.ckpt")
            return result

    monkeypatch.setattr(lightning_hybrid.modules.ppo, "PPOUpdate", Saving)
    said: list[str] = []
    monkeypatch.setattr(lightning_hybrid.strategy.checkpoint, "rank_zero_warn", said.append)
    train(ppo(), prompt_file(tmp_path), 1, strategy(2))
    assert "after optimizer steps that a resumed run takes again" in said[0]


class Drawing(L.Callback):
    """Draws where a run and where an epoch begin."""

    def on_train_start(self, *_: Any) -> None:
        torch.rand(1)

    def on_train_epoch_start(self, *_: Any) -> None:
        torch.rand(1)


def test_what_draws_beside_the_data_does_not_change_its_order(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, 5, 5, also=Drawing(), accumulate_grad_batches=1)


def test_an_epoch_cut_short_is_over(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, 3, 3, accumulate_grad_batches=1, limit_train_batches=3)


class Batches:
    """Data that is no loader, and cannot be told where to begin."""

    def __iter__(self) -> Any:
        return iter([[torch.full((4, 6), float(i))] for i in range(7)])

    def __len__(self) -> int:
        return 7


def test_random_streams_go_on_also_where_the_data_cannot_be_told_where_to_begin(tmp_path: Path) -> None:
    assert_goes_on(tmp_path, 7, 7, data=Batches(), accumulate_grad_batches=1)


class Swapped(GAN):
    """Steps the discriminator first, so that the generator's loss leaves gradients in it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        noise, real = batch[0][:, :4], batch[0][:, 4:]
        generator, discriminator = self.optimizers()
        self._step(
            discriminator,
            lambda: (
                self._loss(self.discriminator(real), 1.0)
                + self._loss(self.discriminator(self.generator(noise).detach()), 0.0)
            ),
        )
        self._step(generator, lambda: self._loss(self.discriminator(self.generator(noise)), 1.0))


@pytest.mark.parametrize("toggle", [False, True])
def test_two_optimizers_in_turn_go_on_whatever_gradients_one_leaves_in_the_other(tmp_path: Path, toggle: bool) -> None:
    def fit(resume: Path | None = None) -> torch.Tensor:
        class Save(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
                if resume is None and arguments[-1] == 2:
                    trainer.save_checkpoint(tmp_path / "third.ckpt")

        module = Swapped(toggle)
        trainer = quiet_trainer(HybridDeepSpeedStrategy(stage=2), max_epochs=1, callbacks=[Save()])
        trainer.fit(module, random_batches(), ckpt_path=None if resume is None else str(resume))
        return weights_of(module)

    weights = fit()
    assert torch.equal(fit(tmp_path / "third.ckpt"), weights)
