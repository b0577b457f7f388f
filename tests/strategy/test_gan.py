"""Several optimizers in one module: the case that Lightning's own DeepSpeed strategy refuses (#19773)."""

from __future__ import annotations

import pytest
import torch

from lightning_hybrid import HybridDeepSpeedStrategy
from tests.helpers import GAN, quiet_trainer, random_batches, weights_of


def train(strategy: object, toggle: bool) -> tuple[torch.Tensor, int]:
    module = GAN(toggle)
    trainer = quiet_trainer(strategy, max_epochs=2)
    trainer.fit(module, random_batches())
    return weights_of(module), trainer.global_step


@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "untoggled"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gan_trains_to_the_same_weights_as_without_deepspeed(stage: int, toggle: bool) -> None:
    plain, plain_steps = train("auto", toggle)
    ours, steps = train(HybridDeepSpeedStrategy(stage=stage), toggle)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert steps == plain_steps == 2 * 2 * 6  # epochs × optimizers × batches, as Lightning counts


def test_each_optimizer_has_an_engine_named_after_its_child() -> None:
    seen: dict[str, object] = {}

    class Watching(GAN):
        def on_train_start(self) -> None:
            seen.update(self.trainer.strategy.engines)
            seen["inside"] = {name: e.module for name, e in self.trainer.strategy.engines.items()}

    module = Watching()
    quiet_trainer("hybrid_deepspeed", max_steps=2).fit(module, random_batches())
    assert seen["inside"] == {"generator": module.generator, "discriminator": module.discriminator}


def test_a_second_fit_of_the_same_module_goes_on_from_the_first() -> None:
    module = GAN()
    quiet_trainer("hybrid_deepspeed_stage_1", max_epochs=1).fit(module, random_batches())
    after_one = weights_of(module)
    quiet_trainer("hybrid_deepspeed_stage_2", max_epochs=1).fit(module, random_batches())
    assert not torch.equal(after_one, weights_of(module))
