"""A long PPO run on the built-in task in one process, which measures itself; run as a script by test_soak.py."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L

from lightning_hybrid import PromptDataModule
from lightning_hybrid.callbacks import Checkpoints, History, MetricsFile, SampleLog, StopOnSignal
from lightning_hybrid.data.task import build_tokenizer, task_reward, write_task
from lightning_hybrid.rewards import RewardFunction
from tests.checkpoint import runs
from tests.helpers import quiet_trainer


@dataclass(frozen=True)
class Sample:
    """After a step: bytes of memory, open files, threads, and seconds of the steps since the sample before."""

    step: int
    resident: int
    files: int
    threads: int
    seconds: float


class Meter(L.Callback):
    """Measures every so many steps, and how long saving takes in all."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[Sample] = []
        self.saving = 0.0
        self._step_began = self._seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        strategy: Any = trainer.strategy
        save = strategy.save_checkpoint

        def timed(*args: Any, **kwargs: Any) -> None:
            begin = time.perf_counter()
            save(*args, **kwargs)
            self.saving += time.perf_counter() - begin

        strategy.save_checkpoint = timed

    def on_train_batch_start(self, *_: Any) -> None:
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._seconds += time.perf_counter() - self._step_began
        if trainer.global_step % self.every == 0:
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
            self.samples.append(Sample(trainer.global_step, resident, files, threads, self._seconds / self.every))
            self._seconds = 0.0


def main(folder: str, steps: str, every: str) -> None:
    place = Path(folder)
    task = write_task(place / "task")
    L.seed_everything(0, verbose=False)
    module = runs.ppo()
    module.reward = RewardFunction(task_reward)
    meter = Meter(every=10)
    trainer = quiet_trainer(
        runs.strategy(2),
        callbacks=[
            History(),
            Checkpoints(place / "checkpoints", int(every)),
            SampleLog(place / "samples.jsonl"),
            meter,
            StopOnSignal(place / "checkpoints"),
        ],
        max_steps=int(steps),
        max_epochs=-1,
        logger=MetricsFile(place),
        enable_checkpointing=True,
    )
    data = PromptDataModule(str(task.prompts), tokenizer=build_tokenizer(), batch_size=8)
    begin = time.perf_counter()
    trainer.fit(module, datamodule=data)
    figures = {"seconds": time.perf_counter() - begin, "saving": meter.saving}
    (place / "soak.json").write_text(json.dumps(figures | {"samples": [asdict(s) for s in meter.samples]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
