"""Losses and gradients that are NaN, once or for ever, in a run that is also interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_hybrid.checkpoint.tensors import read_tensors
from tests.faults.harms import Fault
from tests.faults.trials import RANKS, Laboratory, Setting, drawn

pytestmark = pytest.mark.slow


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("engines/*/rank-*.safetensors"))
    return {
        f"{path.relative_to(checkpoint)}/{name}": tensor
        for path in files
        for name, tensor in read_tensors(path).items()
        if name.endswith(":weight")
    }


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("act", ["poison_loss", "poison_gradients"])
def test_a_step_that_is_not_finite(act: str, stage: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn(act, stage)
    poison = Fault(act, chance.choice(("policy loss", "value loss")), 3, rank=chance.choice(RANKS), when="after")
    kind = f"NaN in {act.removeprefix('poison_')} of one step"
    with laboratory.trial(kind, tmp_path, Setting(stage, poison=(poison,))) as trial:
        trial.run(Fault("kill_all", "update", chance.choice((3, 4, 6)), rank=chance.choice(RANKS)))
        trial.finish()
        _, last = trial.place.diary(0)[-1]
        assert json.loads(last)["metrics"]["nonfinite_steps"] == 1.0


@pytest.mark.parametrize("stage", range(4))
def test_steps_that_are_never_finite(stage: int, laboratory: Laboratory, tmp_path: Path) -> None:
    losses = ("policy loss", "value loss")
    poison = [Fault("poison_loss", loss, 4, until=6, rank=1, when="after") for loss in losses]
    setting = Setting(stage, poison=tuple(poison))
    with laboratory.trial("NaN for ever", tmp_path, setting) as trial:
        ended = trial.run(max_nonfinite_steps=2)
        for rank in ended:
            assert rank.code == 1, rank
            assert "NonFiniteError" in rank.err, rank
            assert "the loss was NaN or inf on rank 1" in rank.err, rank
        kept, good = trial.place.newest(), laboratory.reference(setting).checkpoints / "step=000004.ckpt"
        assert f"checkpoint: {kept}" in ended[0].err
        kept_weights, good_weights = weights_in(kept), weights_in(good)
        assert kept_weights.keys() == good_weights.keys()
        assert all(torch.equal(kept_weights[name], good_weights[name]) for name in good_weights)
        trial.finish()
