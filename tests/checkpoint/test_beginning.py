"""Ranks that do not begin at the same place stop together, before they meet in different collectives."""

from __future__ import annotations

import os
from datetime import timedelta

from lightning_hybrid import HybridDeepSpeedStrategy
from lightning_hybrid.errors import CheckpointError
from tests.conftest import RunRanks
from tests.helpers import Regression, quiet_trainer, random_batches


def begin_apart() -> None:
    """Evaluate, then fit, from a checkpoint that only rank 0 was told of: it is not read, so it need not be there."""
    found = "step=2.ckpt" if os.environ["RANK"] == "0" else None
    for run in ("validate", "fit"):
        strategy = HybridDeepSpeedStrategy(stage=2, timeout=timedelta(seconds=30))
        trainer = quiet_trainer(strategy, devices=2, max_epochs=1)
        try:
            getattr(trainer, run)(Regression(), random_batches(), ckpt_path=found)
        except CheckpointError as error:
            print(run, "together:", error.on_every_rank, str(error).replace("\n", " "))


def test_a_checkpoint_that_one_rank_does_not_find_stops_all_at_once(run_ranks: RunRanks) -> None:
    said = (
        "together: True some ranks go on from a checkpoint, and others found none:   rank 0: 'step=2.ckpt'   "
        "rank 1: none keep checkpoints in a folder that all machines share"
    )
    for out in run_ranks(begin_apart, 2):
        validated, fitted = (line for line in out.splitlines() if line.startswith(("validate ", "fit ")))
        assert validated.startswith(f"validate {said}")
        assert fitted.startswith(f"fit {said}")
