"""The running average is the one of the definition, survives a checkpoint, and leaves as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hybrid import HybridDeepSpeedStrategy, SFTConfig, SFTModule
from lightning_hybrid.callbacks import EMA, HFExport
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import load_policy
from tests.helpers import (
    GAN,
    SHARD_EVERYTHING,
    Regression,
    quiet_trainer,
    random_batches,
    tiny_policy,
    weights_of,
)

DECAY = 0.9


class Diary(L.Callback):
    """The weights before the first step and after each one."""

    def __init__(self, child: str) -> None:
        self.child = child
        self.weights: list[Tensor] = []

    def _write(self, module: L.LightningModule) -> None:
        self.weights.append(weights_of(module.get_submodule(self.child)).double())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._write(pl_module)


class Reader(L.Callback):
    """The averaged weights when training ends, and the model's own before and after they were read."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.before = self.average = self.after = torch.empty(0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        child = pl_module.get_submodule(self.ema.child)
        self.before = weights_of(child)
        with self.ema.averaged(trainer):
            self.average = weights_of(child)
        self.after = weights_of(child)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def by_definition(weights: list[Tensor], decay: float = DECAY) -> Tensor:
    average = weights[0]
    for later in weights[1:]:
        average = decay * average + (1 - decay) * later
    return average


def strategy(stage: int) -> HybridDeepSpeedStrategy:
    return HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING if stage == 3 else None)


def fit(
    stage: int, steps: int, *callbacks: L.Callback, ema: EMA | None = None, resume: Path | None = None, **arguments: Any
) -> tuple[Reader, Diary]:
    reader, diary = Reader(ema or EMA("network", DECAY)), Diary("network")
    trainer = quiet_trainer(
        strategy(stage), max_steps=steps, callbacks=[reader.ema, diary, reader, *callbacks], **arguments
    )
    trainer.fit(Regression(), random_batches(batch_size=2), ckpt_path=resume)
    return reader, diary


@pytest.mark.parametrize("stage", [0, 2, pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_average_is_the_one_of_the_definition_and_the_weights_stay_as_they_are(stage: int) -> None:
    reader, diary = fit(stage, 6)
    assert len(diary.weights) == 7
    torch.testing.assert_close(reader.average.double(), by_definition(diary.weights), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(reader.average, reader.before, atol=1e-4)
    assert torch.equal(reader.before, reader.after)
    assert torch.equal(reader.before.double(), diary.weights[-1])


def test_only_optimizer_steps_count_where_batches_are_accumulated() -> None:
    reader, diary = fit(2, 3, accumulate_grad_batches=4)
    assert len(diary.weights) == 13  # unchanged within a step
    torch.testing.assert_close(reader.average.double(), by_definition(diary.weights[::4]), rtol=1e-6, atol=1e-7)


def test_a_step_that_is_skipped_does_not_move_the_average() -> None:
    class OneBadBatch(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)

    reader, diary = Reader(EMA("network", DECAY)), Diary("network")
    trainer = quiet_trainer(strategy(2), max_steps=5, callbacks=[reader.ema, diary, reader])
    trainer.fit(OneBadBatch(), random_batches(batch_size=2))
    weights = diary.weights
    assert torch.equal(weights[2], weights[3])
    torch.testing.assert_close(reader.average.double(), by_definition(weights[:3] + weights[4:]), rtol=1e-6, atol=1e-7)


class BF16Regression(Regression):
    """Weights that are far from 0, so that a small step is far below bf16's resolution."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.add_(1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.network.parameters(), lr=1e-3)


def test_steps_that_vanish_in_bf16_move_the_average() -> None:
    decay = 0.992
    ema, diary = EMA("network", decay), Diary("network")
    masters: list[Tensor] = []
    averages: list[Tensor] = []

    class Masters(L.Callback):
        def _read(self, trainer: L.Trainer) -> None:
            optimizer = trainer.strategy.engines["network"].basic_optimizer
            (flat,) = optimizer.param_groups[0]["params"]
            masters.append(flat.detach().double().clone())
            averages.extend(s["average"].clone() for s in [optimizer.state.get(flat, {})] if "average" in s)

        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            self._read(trainer)

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self._read(trainer)

    trainer = quiet_trainer(strategy(2), max_steps=8, precision="bf16-mixed", callbacks=[ema, diary, Masters()])
    trainer.fit(BF16Regression(), random_batches(batch_size=2))
    assert masters[0].dtype == torch.float64
    assert averages[-1].dtype == torch.float32
    expected = by_definition(masters, decay)
    torch.testing.assert_close(averages[-1].double(), expected, rtol=1e-6, atol=1e-7)
    moved = expected != masters[0]
    assert moved.sum() > 0.9 * len(expected[masters[0] != 0])
    in_bf16 = masters[0].bfloat16()
    for later in masters[1:]:
        in_bf16.lerp_(later.bfloat16(), 1 - decay)
    assert torch.equal(in_bf16, masters[0].bfloat16())  # what an average in bf16 would have become: nothing


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 3), (0, 3), (3, 1)])
def test_a_run_that_goes_on_has_the_average_of_one_that_was_not_interrupted(
    tmp_path: Path, before: int, after: int
) -> None:
    whole, _ = fit(before, 6, SaveAt(3, tmp_path / "three.ckpt"))
    resumed, _ = fit(after, 6, resume=tmp_path / "three.ckpt")
    if before == after:
        assert torch.equal(whole.average, resumed.average)
    torch.testing.assert_close(whole.average, resumed.average, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_without_an_average_begins_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = quiet_trainer(strategy(2), max_steps=5, callbacks=[SaveAt(3, tmp_path / "three.ckpt")])
    trainer.fit(Regression(), random_batches(batch_size=2))
    reader, diary = fit(2, 6, resume=tmp_path / "three.ckpt")
    assert "holds no average of 'network': it begins with the weights of the checkpoint" in caplog.text
    torch.testing.assert_close(reader.average.double(), by_definition(diary.weights), rtol=1e-6, atol=1e-7)


def test_an_average_that_nobody_kept_up_is_not_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(2, 4, SaveAt(3, tmp_path / "three.ckpt"))
    without = quiet_trainer(strategy(2), max_steps=6, callbacks=[SaveAt(5, tmp_path / "five.ckpt")])
    without.fit(Regression(), random_batches(batch_size=2), ckpt_path=tmp_path / "three.ckpt")
    reader, diary = fit(2, 8, resume=tmp_path / "five.ckpt")
    assert "holds no average" in caplog.text
    torch.testing.assert_close(reader.average.double(), by_definition(diary.weights), rtol=1e-6, atol=1e-7)


def test_a_second_fit_with_the_same_callback_begins_anew() -> None:
    ema = EMA("network", DECAY)
    fit(2, 3, ema=ema)
    reader, diary = fit(2, 3, ema=ema)
    torch.testing.assert_close(reader.average.double(), by_definition(diary.weights), rtol=1e-6, atol=1e-7)


def test_one_of_several_engines_is_averaged() -> None:
    reader, diary = Reader(EMA("generator", DECAY)), Diary("generator")
    trainer = quiet_trainer(strategy(2), max_steps=8, callbacks=[reader.ema, diary, reader])
    trainer.fit(GAN(), random_batches())
    torch.testing.assert_close(reader.average.double(), by_definition(diary.weights), rtol=1e-6, atol=1e-7)


def text_batches(rows: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 40, (rows, 9), generator=generator)
    ones = torch.ones(9, dtype=torch.bool)
    batch = [{"input_ids": row, "attention_mask": ones, "loss_mask": ones} for row in ids]
    return DataLoader(batch, batch_size=4)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_averaged_model_is_written_as_a_folder_of_its_own(tmp_path: Path, stage: int) -> None:
    tokenizer = build_tokenizer()
    policy = tiny_policy()
    own = HFExport(tmp_path / "model", "policy", tokenizer)
    ema = EMA("policy", DECAY, HFExport(tmp_path / "ema", "policy", tokenizer))
    diary = Diary("policy")
    trainer = quiet_trainer(strategy(stage), max_steps=3, callbacks=[ema, own, diary])
    trainer.fit(SFTModule(policy, SFTConfig(lr=1e-2)), text_batches())
    written, averaged = load_policy(tmp_path / "model"), load_policy(tmp_path / "ema")
    assert torch.equal(weights_of(written).double(), diary.weights[-1])
    torch.testing.assert_close(weights_of(averaged).double(), by_definition(diary.weights), rtol=1e-6, atol=1e-7)
    of_own, of_average = ((tmp_path / name / "README.md").read_text() for name in ("model", "ema"))
    assert "moving average of the trained ones, decay 0.9." in of_average
    assert "## Last metrics" not in of_average  # nobody has measured it
    assert "moving average" not in of_own
    assert "| loss |" in of_own


def train_on_ranks(folder: str, stage: int, ranks: int, steps: int, resume: str | None = None) -> None:
    reader, diary = Reader(EMA("network", DECAY)), Diary("network")
    trainer = quiet_trainer(
        strategy(stage),
        max_steps=steps,
        devices=ranks,
        callbacks=[reader.ema, diary, reader, SaveAt(2, Path(folder) / "two.ckpt")],
        use_distributed_sampler=True,
    )
    # Both numbers of ranks take the same four rows per step.
    trainer.fit(Regression(), random_batches(batch_size=4 // ranks), ckpt_path=resume)
    if resume is None:
        torch.testing.assert_close(reader.average.double(), by_definition(diary.weights), rtol=1e-6, atol=1e-7)
    assert torch.equal(reader.before, reader.after)
    if trainer.is_global_zero:
        torch.save(reader.average, Path(folder) / f"average-of-{ranks}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_ranks_average_their_shares_and_another_number_of_them_goes_on(
    tmp_path: Path, run_ranks: Any, stage: int
) -> None:
    run_ranks(train_on_ranks, 2, str(tmp_path), stage, 2, 4)
    run_ranks(train_on_ranks, 1, str(tmp_path), stage, 1, 4, str(tmp_path / "two.ckpt"))
    one, two = (torch.load(tmp_path / f"average-of-{ranks}.pt") for ranks in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_out_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay of EMA must be above 0 and below 1, found"):
        EMA("actor", decay)


def test_a_child_that_nothing_trains_is_refused() -> None:
    trainer = quiet_trainer(strategy(2), max_steps=1, callbacks=[EMA("actor")])
    with pytest.raises(ConfigError, match="none trains 'actor'; there are: 'network'"):
        trainer.fit(Regression(), random_batches())


def test_another_strategy_is_refused() -> None:
    trainer = quiet_trainer("auto", max_steps=1, callbacks=[EMA("network")])
    with pytest.raises(ConfigError, match=r"no engines \(SingleDeviceStrategy\). Use strategy='hybrid_deepspeed'"):
        trainer.fit(Regression(), random_batches())
