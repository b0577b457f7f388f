"""What a checkpoint holds is what is evaluated; evaluating first does not spoil a later fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_hybrid import HybridDeepSpeedStrategy
from lightning_hybrid.engines import backward, build_engine, cast_parameters, discard_gradients, engine_config
from lightning_hybrid.errors import CheckpointError, StrategyError
from tests.helpers import Regression, quiet_trainer, random_batches, weights_of


def trained(stage: int, folder: Path) -> Regression:
    module = Regression()
    keep = ModelCheckpoint(dirpath=folder, save_last=True)
    strategy = HybridDeepSpeedStrategy(stage=stage)
    trainer = quiet_trainer(strategy, max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(module, random_batches(), random_batches(seed=2))
    return module


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_validating_a_checkpoint_evaluates_its_weights(stage: int, tmp_path: Path) -> None:
    module = trained(stage, tmp_path)
    expected = quiet_trainer("auto").validate(plain_copy(module), random_batches(seed=3), verbose=False)
    fresh = Regression()
    got = quiet_trainer(HybridDeepSpeedStrategy(stage=stage)).validate(
        fresh, random_batches(seed=3), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False
    )
    assert got[0]["val_loss"] == pytest.approx(expected[0]["val_loss"], rel=1e-5)
    torch.testing.assert_close(weights_of(fresh), weights_of(module))


def plain_copy(module: Regression) -> Regression:
    copy = Regression()
    torch.nn.utils.vector_to_parameters(weights_of(module), copy.parameters())
    return copy


@pytest.mark.parametrize("stage", [2, 3])
def test_a_module_may_be_validated_and_then_fitted(stage: int) -> None:
    module = Regression()
    quiet_trainer(HybridDeepSpeedStrategy(stage=stage)).validate(module, random_batches(), verbose=False)
    before = weights_of(module)
    quiet_trainer(HybridDeepSpeedStrategy(stage=stage), max_epochs=1).fit(
        module, random_batches(), random_batches(seed=2)
    )
    assert not torch.equal(before, weights_of(module))


def test_saving_after_fit_is_refused_because_the_engines_are_gone(tmp_path: Path) -> None:
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=2)
    trainer.fit(Regression(), random_batches(), random_batches(seed=2))
    with pytest.raises(StrategyError, match="engines exist only during fit; use ModelCheckpoint, or HFExport"):
        trainer.save_checkpoint(tmp_path / "late.ckpt")


class WithTemperature(Regression):
    """Holds a buffer that no engine has."""

    def __init__(self, name: str = "temperature") -> None:
        super().__init__()
        self.register_buffer(name, torch.tensor(2.0))


@pytest.mark.parametrize("evaluate", [True, False])
def test_what_is_outside_all_engines_is_loaded_and_refused_where_it_is_of_another_module(
    evaluate: bool, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trained = WithTemperature()
    trained.temperature.fill_(3.0)
    quiet_trainer("hybrid_deepspeed", max_epochs=1, callbacks=[keep], enable_checkpointing=True).fit(
        trained, random_batches(), random_batches(seed=2)
    )

    def resume(module: Regression) -> None:
        trainer, path = quiet_trainer("hybrid_deepspeed", max_epochs=2), str(tmp_path / "last.ckpt")
        if evaluate:
            trainer.validate(module, random_batches(), ckpt_path=path, verbose=False)
        else:
            trainer.fit(module, random_batches(), random_batches(seed=2), ckpt_path=path)

    same, other = WithTemperature(), WithTemperature("scale")
    resume(same)
    assert float(same.temperature) == 3.0
    with pytest.raises(CheckpointError, match=r"it lacks \['scale'\], and has \['temperature'\] beside"):
        resume(other)
    other.strict_loading = False
    resume(other)


def test_casting_leaves_buffers_as_they_are() -> None:
    module = nn.BatchNorm1d(3)
    cast_parameters(module, torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.running_mean is not None
    assert module.running_mean.dtype == torch.float32


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_discarded_gradients_leave_no_trace(stage: int, offload: bool, alone_in_group: None) -> None:
    module = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(module.weight)
    config = engine_config(stage=stage, precision="32-true", offload_optimizer=offload)
    engine = build_engine(module, torch.optim.SGD(module.parameters(), lr=1.0), config)
    for _ in range(2):
        backward(100 * module(torch.ones(1, 4)).sum(), [engine])
    discard_gradients(engine)
    backward(module(torch.ones(1, 4)).sum(), [engine])
    engine.step()
    torch.testing.assert_close(weights_of(module), torch.full((4,), -1.0))
