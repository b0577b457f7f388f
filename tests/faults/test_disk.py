"""A disk that is full when a checkpoint is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harms import Fault
from tests.faults.trials import RANKS, Laboratory, assert_blames, drawn, setting_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("full", RANKS)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "beside training"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_full_disk(step: int, asynchronous: bool, full: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("full", step, asynchronous, full)
    with laboratory.trial("disk full", tmp_path, setting_of(chance), asynchronous) as trial:
        ended = trial.run(Fault("fill_disk", "save", step, rank=full))
        for rank in ended:
            assert rank.code == 1, rank
            assert "CheckpointError" in rank.err, rank
            assert "File too large" in rank.err, rank
            assert f"rank-{full:05d}.safetensors" in rank.err, rank
        assert_blames(ended[1 - full], full)
        assert trial.place.newest().name == f"step={step - 2:06d}.ckpt"
        trial.finish()
