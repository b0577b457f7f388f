"""What engines leave behind on a model: nothing, and a whole model where one rank has all of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_hybrid.strategy import HybridDeepSpeedStrategy
from tests.helpers import GAN, quiet_trainer, random_batches

SHARDED = {
    "zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0},
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_after_a_fit_the_module_is_plain_whole_and_can_be_copied(stage: int) -> None:
    module = GAN()
    shapes = [p.shape for p in module.parameters()]
    before = [p.detach().clone() for p in module.parameters()]
    strategy = HybridDeepSpeedStrategy(stage=stage, config=SHARDED if stage == 3 else None)
    quiet_trainer(strategy, max_epochs=1).fit(module, random_batches())
    assert [p.shape for p in module.parameters()] == shapes
    assert all((p != old).any() for p, old in zip(module.parameters(), before, strict=True))
    assert not [name for p in module.parameters() for name in vars(p)]
    assert {type(child._parameters) for child in module.modules()} == {dict}
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module.generator)))
    assert torch.equal(copied(torch.ones(1, 4)), module.generator(torch.ones(1, 4)))


class Breaks(GAN):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        if batch_idx == 2:
            self.generator.eval()  # as to generate
            handle = self.generator[0].register_forward_hook(self._fail)  # in the middle of a forward
            try:
                self.generator(batch[0][:, :4])
            finally:
                handle.remove()
        super().training_step(batch, batch_idx)

    def _fail(self, *_: object) -> None:
        raise ArithmeticError("in the middle of a forward")


def test_a_fit_that_broke_off_in_a_sharded_forward_leaves_a_module_that_trains_at_any_stage() -> None:
    module = Breaks()
    with pytest.raises(ArithmeticError):
        quiet_trainer(HybridDeepSpeedStrategy(stage=3, config=SHARDED), max_epochs=1).fit(module, random_batches())
    assert all(child.training for child in module.modules())
    module.__class__ = GAN
    for stage in (2, 3, 1):
        before = module.generator[0].weight.detach().clone()
        config = SHARDED if stage == 3 else None
        quiet_trainer(HybridDeepSpeedStrategy(stage=stage, config=config), max_epochs=1).fit(module, random_batches())
        assert not torch.equal(module.generator[0].weight, before)
