"""A run on several ranks, one of which is lost; started by test_liveness.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_hybrid import HybridDeepSpeedStrategy
from tests.helpers import Regression, quiet_trainer, random_batches


class Lost(Regression):
    """One rank comes to harm in its third step, at a phase that it names."""

    def __init__(self, how: str, rank: int, folder: Path) -> None:
        super().__init__()
        self.how, self.rank, self.folder = how, rank, folder

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.how != "unharmed" and batch_idx == 3 and self.global_rank == self.rank:
            self.trainer.strategy.liveness.say("reward")
            time.sleep(1.5)  # heard of once more
            (self.folder / "harm").write_text(str(time.time()))
            self._come_to_harm()
        if batch_idx == 3:
            (self.folder / f"pid{self.global_rank}").write_text(str(os.getpid()))
        return super().training_step(batch, batch_idx)

    def _come_to_harm(self) -> None:
        if self.how == "raise":
            raise ValueError("the reward is out of order")
        if self.how == "sleep":
            time.sleep(10_000)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.how])


def main(how: str, rank: str, folder: str, timeout: str, fits: str = "1") -> None:
    """Train on two ranks until one is killed, stopped, raises or sleeps for ever; "unharmed" lets both end well."""
    for _ in range(int(fits)):
        strategy: Any = HybridDeepSpeedStrategy(stage=2, timeout=timedelta(seconds=float(timeout)))
        module = Lost(how, int(rank), Path(folder))
        quiet_trainer(strategy, devices=2, max_epochs=1).fit(module, random_batches(), random_batches(seed=2))
        left = [thread.name for thread in threading.enumerate() if "ranks" in thread.name]
        assert left == [], left


if __name__ == "__main__":
    main(*sys.argv[1:])
