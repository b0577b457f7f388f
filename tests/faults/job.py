"""A rank of a tiny PPO run as a recipe would make it, which goes on from the newest complete checkpoint by itself."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L

from lightning_hybrid import PPOModule, PromptDataModule
from lightning_hybrid.callbacks import Checkpoints, History, MetricsFile, SampleLog, StopOnSignal
from lightning_hybrid.checkpoint import newest_complete
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.rewards import RemoteReward, RewardFunction
from tests.checkpoint import runs
from tests.faults.harms import Fault, Harms
from tests.helpers import quiet_trainer, weights_of

STEPS, EVERY = 8, 2
# Seconds, the strategy's; ranks that share the machine with those of other tests may be silent for longer.
TIMEOUT = 15.0 if "PYTEST_XDIST_WORKER" in os.environ else 6.0


def train(
    folder: str,
    stage: int,
    lora: bool = False,
    asynchronous: bool = False,
    faults: Sequence[dict[str, Any]] = (),
    resume: str | None = None,
    keep: int = 2,
    max_nonfinite_steps: int = 10,
    reward: dict[str, Any] | None = None,
) -> None:
    """Train to the end, and leave a digest of the weights in ``done-<rank>``."""
    place, rank = Path(folder), int(os.environ["RANK"])
    (place / f"pid-{rank}").write_text(str(os.getpid()))
    harms = Harms([Fault(**fault) for fault in faults], rank, place)
    checkpoints = place / "checkpoints"
    L.seed_everything(0, verbose=False)
    module = runs.ppo(lora)
    module.reward = _reward(**(reward or {}))
    trainer = quiet_trainer(
        runs.strategy(
            stage,
            timeout=timedelta(seconds=TIMEOUT),
            checkpoint={"asynchronous": asynchronous},
            max_nonfinite_steps=max_nonfinite_steps,
        ),
        callbacks=[
            History(),
            Checkpoints(checkpoints, EVERY, keep),
            SampleLog(place / "samples.jsonl", every=1),
            Diary(place, rank),
            harms,
            StopOnSignal(checkpoints),
        ],
        devices=2,
        max_steps=STEPS,
        max_epochs=-1,
        logger=MetricsFile(place),
        log_every_n_steps=1,
        enable_checkpointing=True,
        use_distributed_sampler=True,
    )
    data = PromptDataModule(
        str(place / "prompts.txt"), tokenizer=build_tokenizer(), prompt_key="text", batch_size=4, seed=3
    )
    newest = newest_complete(checkpoints) if resume is None else resume
    trainer.fit(module, datamodule=data, ckpt_path=None if newest is None else str(newest))


def judge(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward; faults wrap it."""
    return runs.share_of_warm(prompts, responses)


def _reward(url: str | None = None, timeout_seconds: float = 600.0, retries: int = 5) -> Any:
    if url is not None:
        return RemoteReward(url, timeout_seconds=timeout_seconds, retries=retries)
    return RewardFunction(lambda prompts, responses: judge(prompts, responses), timeout_seconds)


class Diary(runs.Diary):
    """Write down what each step logged and sampled as soon as it is done, and in the end what the weights are."""

    def __init__(self, place: Path, rank: int) -> None:
        super().__init__()
        self.place, self.rank = place, rank

    def on_train_start(self, trainer: L.Trainer, pl_module: PPOModule) -> None:
        (self.place / f"began-{self.rank}").write_text(str(time.time()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: PPOModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        step = trainer.global_step
        with (self.place / f"diary-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **self.steps[step]}, sort_keys=True) + "\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: PPOModule) -> None:
        weights = [weights_of(model).numpy().tobytes() for model in (pl_module.actor, pl_module.critic)]
        digests = [hashlib.sha256(content).hexdigest() for content in weights]
        (self.place / f"done-{self.rank}").write_text(json.dumps(digests))
