"""What Lightning promises of any strategy holds: the same weights, counts and figures as on a single device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_hybrid import EngineSpec, HybridDeepSpeedStrategy
from lightning_hybrid.errors import CheckpointError
from tests.helpers import GAN, Regression, quiet_trainer, random_batches, weights_of

PLAIN = "auto"


def fit(strategy: Any, **arguments: Any) -> tuple[Regression, Any]:
    module = Regression()
    trainer = quiet_trainer(strategy, **({"max_epochs": 2} | arguments))
    trainer.fit(module, random_batches(), random_batches(seed=2))
    return module, trainer


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate_grad_batches": 4}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulated, with a remainder", "clipped"],
)
def test_weights_steps_schedule_and_metrics_are_those_of_a_single_device(stage: int, arguments: dict[str, Any]) -> None:
    plain, plain_trainer = fit(PLAIN, **arguments)
    ours, trainer = fit(HybridDeepSpeedStrategy(stage=stage), **arguments)
    torch.testing.assert_close(weights_of(ours), weights_of(plain), rtol=1e-5, atol=1e-6)
    assert trainer.global_step == plain_trainer.global_step
    assert ours.seen == plain.seen  # learning rates, batch by batch
    for name in ("loss", "val_loss"):
        torch.testing.assert_close(trainer.callback_metrics[name], plain_trainer.callback_metrics[name])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains_bf16_weights_close_to_fp32(precision: str, stage: int) -> None:
    plain, _ = fit(PLAIN)
    ours, _ = fit(HybridDeepSpeedStrategy(stage=stage), precision=precision)
    assert next(ours.network.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(weights_of(ours), weights_of(plain), rtol=0.05, atol=0.03)


@pytest.mark.parametrize("stage", [2, 3])
def test_validate_test_and_predict_agree_with_a_single_device(stage: int) -> None:
    results = []
    for strategy in (PLAIN, HybridDeepSpeedStrategy(stage=stage)):
        module, trainer = Regression(), quiet_trainer(strategy)
        validated = trainer.validate(module, random_batches(seed=2), verbose=False)
        tested = trainer.test(module, random_batches(seed=3), verbose=False)
        predicted = torch.cat(trainer.predict(module, random_batches(seed=4)))
        results.append((validated[0]["val_loss"], tested[0]["test_loss"], predicted))
    torch.testing.assert_close(results[1], results[0])


def test_testing_after_fitting_uses_the_trained_weights() -> None:
    figures = []
    for strategy in (PLAIN, "hybrid_deepspeed_stage_3"):
        module, trainer = fit(strategy)
        figures.append(trainer.test(module, random_batches(seed=3), verbose=False)[0]["test_loss"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_resumed_from_a_checkpoint_ends_where_an_uninterrupted_one_does(stage: int, tmp_path: Path) -> None:
    def run(epochs: int, ckpt: str | None = None) -> torch.Tensor:
        module = Regression()
        keep = ModelCheckpoint(dirpath=tmp_path / str(epochs), save_last=True)
        trainer = quiet_trainer(
            HybridDeepSpeedStrategy(stage=stage), max_epochs=epochs, callbacks=[keep], enable_checkpointing=True
        )
        trainer.fit(module, random_batches(), random_batches(seed=2), ckpt_path=ckpt)
        return weights_of(module)

    run(1)
    resumed = run(2, str(tmp_path / "1" / "last.ckpt"))
    module = Regression()
    quiet_trainer(HybridDeepSpeedStrategy(stage=stage), max_epochs=2).fit(
        module, random_batches(), random_batches(seed=2)
    )
    torch.testing.assert_close(resumed, weights_of(module), rtol=1e-6, atol=1e-7)


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json: it is not a checkpoint of this strategy"):
        quiet_trainer("hybrid_deepspeed", max_epochs=1).fit(
            Regression(), random_batches(), ckpt_path=str(tmp_path / "other.ckpt")
        )


class Spanning(Regression):
    """One optimizer over two children: the module itself has to become the engine."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def _loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(self.head(self.network(batch[0][:, :5])), batch[0][:, 5:])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_optimizer_may_span_several_children(stage: int) -> None:
    weights = []
    for strategy in (PLAIN, HybridDeepSpeedStrategy(stage=stage)):
        module = Spanning()
        quiet_trainer(strategy, max_epochs=1).fit(module, random_batches(), random_batches(seed=2))
        weights.append(weights_of(module))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


class CountingIterations(GAN):
    """Counts a batch as one step, like PPO."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        with self.trainer.strategy.one_global_step():
            super().training_step(batch, batch_idx)


def test_max_steps_and_every_n_train_steps_count_iterations_where_a_module_says_so(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=5, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(CountingIterations(), random_batches())
    assert trainer.global_step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]


def test_max_steps_counts_optimizer_steps_otherwise() -> None:
    batches: list[int] = []

    class Watching(GAN):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            batches.append(batch_idx)
            super().training_step(batch, batch_idx)

    quiet_trainer("hybrid_deepspeed", max_steps=6).fit(Watching(), random_batches())
    assert len(batches) == 3  # two optimizer steps each


@pytest.mark.parametrize(
    "name",
    [
        "hybrid_deepspeed",
        "hybrid_deepspeed_stage_1",
        "hybrid_deepspeed_stage_2",
        "hybrid_deepspeed_stage_3",
        "hybrid_deepspeed_stage_2_offload",
        "hybrid_deepspeed_stage_3_offload",
    ],
)
def test_every_registered_name_trains(name: str) -> None:
    module = Regression()
    before = weights_of(module)
    quiet_trainer(name, max_steps=2).fit(module, random_batches(), random_batches(seed=2))
    assert not torch.equal(before, weights_of(module))


def test_an_engines_own_keys_are_laid_over_the_strategys_section_by_section() -> None:
    strategy = HybridDeepSpeedStrategy(config={"zero_optimization": {"contiguous_gradients": False}})
    own = EngineSpec(config={"zero_optimization": {"reduce_bucket_size": 1000}})
    zero = strategy.engine_config(own)["zero_optimization"]
    assert (zero["contiguous_gradients"], zero["reduce_bucket_size"]) == (False, 1000)


def test_a_custom_deepspeed_key_reaches_every_engine() -> None:
    found: list[bool] = []

    class Watching(GAN):
        def on_train_start(self) -> None:
            found.extend(e.zero_contiguous_gradients() for e in self.trainer.strategy.engines.values())

    strategy = HybridDeepSpeedStrategy(config={"zero_optimization": {"contiguous_gradients": False}})
    quiet_trainer(strategy, max_steps=2).fit(Watching(), random_batches())
    assert found == [False, False]
