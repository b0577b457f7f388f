"""What engines leave behind on a model: nothing, and a whole model where one rank has all of it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

from lightning_hybrid.engines.plain import PlainModel
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


class Disk:
    """What DeepSpeed's parameters know of where they were offloaded to."""

    dtype = torch.float32

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_path(self, parameter: Any, must_exist: bool) -> str:
        """The file's name, as DeepSpeed forms it."""
        path = self.folder / f"{parameter.ds_id}_param.tensor.swp"
        assert path.exists() or not must_exist
        return str(path)


@pytest.mark.parametrize("status", ["NOT_AVAILABLE", "INFLIGHT"])
def test_a_parameter_that_was_offloaded_to_a_disk_is_read_from_its_file(status: str, tmp_path: Path) -> None:
    """As DeepSpeed leaves it there; it needs a compiled op to do so itself."""
    module = torch.nn.Linear(3, 2)
    plain = PlainModel(module)
    values = torch.arange(6.0)
    parameter: Any = module.weight
    parameter.ds_id, parameter.ds_numel, parameter.ds_shape = 4, 6, torch.Size([2, 3])
    parameter.ds_tensor = torch.tensor(1).half()
    parameter.ds_tensor.status = PartitionedParamStatus[status]
    parameter.nvme_swapper = Disk(tmp_path)
    parameter.data = torch.empty(0)
    (tmp_path / "4_param.tensor.swp").write_bytes(torch.cat([values, torch.zeros(250)]).numpy().tobytes())
    plain.restore()
    (tmp_path / "4_param.tensor.swp").unlink()
    assert module.weight.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert not vars(module.weight)
    assert module(torch.ones(1, 3)).shape == (1, 2)
