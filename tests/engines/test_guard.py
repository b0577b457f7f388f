"""Steps with NaN or inf are skipped as if their batch had not been, on every rank, and a run that only skips stops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid import HybridDeepSpeedStrategy
from lightning_hybrid.engines import backward, build_engine, engine_config
from lightning_hybrid.engines.guard import StepGuard, gradients_are_finite
from lightning_hybrid.errors import NonFiniteError
from tests.helpers import GAN, SHARD_EVERYTHING, quiet_trainer, weights_of

ROWS = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))


class Plain(L.LightningModule):
    """One optimizer without a schedule, so that a skipped step leaves nothing behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        said = self.network(batch[0][:, :5].to(next(self.network.parameters()).dtype)).float()
        return nn.functional.mse_loss(said, batch[0][:, 5:])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.network.parameters(), lr=1e-2)


def batches(rows: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(rows), batch_size=4)


def poisoned(*indices: int, value: float = float("nan")) -> Tensor:
    """All rows, one number of each of these batches replaced."""
    rows = ROWS.clone()
    for index in indices:
        rows[4 * index + 1, 5] = value
    return rows


def without(*indices: int) -> Tensor:
    return torch.cat([ROWS[4 * i : 4 * i + 4] for i in range(6) if i not in indices])


def fit(rows: Tensor, module: L.LightningModule | None = None, most: int = 10, **arguments: Any) -> Any:
    """Train for one epoch; `strategy` arguments and `trainer` arguments apart."""
    strategy = HybridDeepSpeedStrategy(max_nonfinite_steps=most, **arguments.pop("strategy", {}))
    module = module or Plain()
    quiet_trainer(strategy, max_epochs=1, **arguments).fit(module, batches(rows))
    return module, strategy


LAYOUTS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, "config": SHARD_EVERYTHING},
    "2, offloaded": {"stage": 2, "offload_optimizer": True},
    "3, offloaded": {"stage": 3, "offload_optimizer": True},
}
# Clipping reads the norm that tells what is not finite.
CLIPPED = [pytest.param(name, 0.1, marks=[] if name in ("0", "3") else pytest.mark.slow) for name in LAYOUTS]


@pytest.mark.parametrize(("name", "clip"), [*((name, None) for name in LAYOUTS), *CLIPPED])
def test_a_poisoned_batch_is_as_if_it_had_not_been(name: str, clip: float | None) -> None:
    layout, trainer = LAYOUTS[name], {"gradient_clip_val": clip}
    found, strategy = fit(poisoned(2), strategy=layout, **trainer)
    wanted, _ = fit(without(2), strategy=layout, **trainer)
    assert torch.equal(weights_of(found), weights_of(wanted))
    assert strategy.guard.state_dict() == {"in_a_row": {}, "total": 1}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_so_it_is_in_bf16(stage: int) -> None:
    found, _ = fit(poisoned(0, 3), strategy={"stage": stage}, precision="bf16-mixed")
    wanted, _ = fit(without(0, 3), strategy={"stage": stage}, precision="bf16-mixed")
    assert torch.equal(weights_of(found), weights_of(wanted))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_poisoned_batch_among_accumulated_ones_takes_the_others_with_it(stage: int) -> None:
    found, _ = fit(poisoned(2), strategy={"stage": stage}, accumulate_grad_batches=2)
    wanted, _ = fit(without(2, 3), strategy={"stage": stage}, accumulate_grad_batches=2)
    assert torch.equal(weights_of(found), weights_of(wanted))


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_told_not_to_look_at_gradients_is_replaced(stage: int) -> None:
    layout = {"stage": stage, "config": {"zero_optimization": {"compute_grad_norm": False}}}
    found, _ = fit(poisoned(2), strategy=layout)
    wanted, _ = fit(without(2), strategy=layout)
    assert torch.equal(weights_of(found), weights_of(wanted))


class Infinite(Plain):
    """Where a target is above 50, adds inf to the loss, which has finite gradients."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ordinary = batch[0].clamp(max=3.0)
        return super().training_step([ordinary], batch_idx) + (torch.inf if batch[0].max() > 50 else 0.0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_infinite_loss_with_finite_gradients_counts_too(stage: int, caplog: pytest.LogCaptureFixture) -> None:
    found, _ = fit(poisoned(2, value=99.0), Infinite(), strategy={"stage": stage})
    said = "step 2: this rank's loss and gradients of engine 'network' are not finite"
    assert f"{said}; its optimizer step is skipped on every rank" in caplog.text
    wanted, _ = fit(without(2), Infinite(), strategy={"stage": stage})
    assert torch.equal(weights_of(found), weights_of(wanted))


class Exploding(Plain):
    """Where a target is above 50, the loss is finite and its gradients are not: the slope of a root at 0."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        said = self.network(batch[0][:, :5])
        zero = (said * (0.0 if batch[0].max() > 50 else 1.0)).square().sum()
        return super().training_step([batch[0].clamp(max=3.0)], batch_idx) + 1e-3 * zero.sqrt()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_that_are_not_finite_stop_the_run_after_too_many_in_a_row(stage: int) -> None:
    module = Exploding()
    with pytest.raises(NonFiniteError) as caught:
        fit(poisoned(1, 3, 4, value=99.0), module, most=2, strategy={"stage": stage})
    message = str(caught.value)
    assert (
        "engine 'network' skipped its last 2 optimizer steps (strategy.max_nonfinite_steps=2), up to step 4" in message
    )
    assert "the gradients were NaN or inf while the loss was finite on every rank" in message
    assert "Lower the learning rate, clip gradients" in message
    assert caught.value.on_every_rank
    assert weights_of(module).isfinite().all()


def test_of_two_engines_each_is_counted_by_itself() -> None:
    class Half(GAN):
        """The discriminator never sees a finite number, the generator always does."""

        def _loss(self, logits: Tensor, target: float) -> Tensor:
            mine = self.optimizers()[1]._optimizer is self._stepping
            return super()._loss(logits, target) * (float("nan") if mine else 1.0)

        def _step(self, optimizer: Any, compute: Any) -> None:
            self._stepping = optimizer._optimizer
            super()._step(optimizer, compute)

    module = Half()
    with pytest.raises(NonFiniteError, match=r"(?s)'discriminator' skipped its last 3 .*rank 0"):
        fit(ROWS, module, most=3)
    assert module.trainer.strategy.guard.in_a_row == {"discriminator": 3}


def test_steps_of_one_iteration_are_judged_when_it_is_whole() -> None:
    class Iterations(GAN):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            with self.trainer.strategy.one_global_step():
                super().training_step([batch[0] * float("nan")], batch_idx)
                self.whole = True

    module = Iterations()
    with pytest.raises(NonFiniteError):
        fit(ROWS, module, most=1)
    assert module.whole
    assert module.trainer.global_step == 1


def test_counts_go_on_from_a_checkpoint() -> None:
    guard = StepGuard(10)
    guard.load_state_dict({"in_a_row": {"actor": 3}, "total": 7})
    assert guard.state_dict() == {"in_a_row": {"actor": 3}, "total": 7}
    guard.load_state_dict({})
    assert guard.state_dict() == {"in_a_row": {}, "total": 0}


@pytest.mark.usefixtures("alone_in_group")
def test_a_run_resumed_after_it_was_stopped_begins_to_count_anew() -> None:
    stopped = StepGuard(3)
    for step in range(3):
        stopped._count("actor", step, own_losses_finite=False)
    with pytest.raises(NonFiniteError):
        stopped.stop_if_hopeless()
    resumed = StepGuard(3)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == {"in_a_row": {}, "total": 3}


@pytest.mark.usefixtures("alone_in_group")
def test_a_guard_judges_only_steps_that_were_skipped_since_it_last_did() -> None:
    guard = StepGuard(1)
    guard._count("actor", 4, own_losses_finite=False)
    with pytest.raises(NonFiniteError, match="up to step 4"):
        guard.stop_if_hopeless()
    guard.stop_if_hopeless()


@pytest.mark.usefixtures("alone_in_group")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_waiting_gradients_are_found_wherever_zero_keeps_them(stage: int) -> None:
    network = nn.Linear(4, 1)
    config = engine_config(stage=stage, precision="32-true")
    engine = build_engine(network, torch.optim.SGD(network.parameters(), lr=0.1), config)
    assert gradients_are_finite(engine)
    backward(network(torch.ones(2, 4)).sum(), [engine])
    assert gradients_are_finite(engine)
    backward(network(torch.full((2, 4), torch.inf)).sum(), [engine])
    assert not gradients_are_finite(engine)


def train_where_one_rank_sees_nan(folder: str, stage: int) -> None:
    """Called on two ranks; batch 2 of rank 1 is poisoned, then every batch of rank 1."""
    rank = int(os.environ["RANK"])
    found, strategy = fit(poisoned(2) if rank else ROWS, strategy={"stage": stage}, devices=2, accelerator="cpu")
    wanted, _ = fit(without(2), strategy={"stage": stage}, devices=2, accelerator="cpu")
    assert strategy.guard.total == 1
    assert torch.equal(weights_of(found), weights_of(wanted))
    with pytest.raises(NonFiniteError, match="the loss was NaN or inf on rank 1. Its weights"):
        fit(poisoned(0, 1) if rank else ROWS, strategy={"stage": stage}, devices=2, most=2)
    Path(folder, f"done{rank}").touch()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_skip_together_what_one_of_them_saw(run_ranks: Any, tmp_path: Path, stage: int) -> None:
    run_ranks(train_where_one_rank_sees_nan, 2, str(tmp_path), stage)
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()
