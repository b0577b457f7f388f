"""A recipe, as a program, that trains nothing and logs what training would: a score that is best at kl_coef=0.1."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lightning_hybrid.config import PPORun
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.errors import RewardError


def job(run: PPORun) -> None:
    if run.algorithm.kl_coef > 0.5:
        raise RewardError("the judge is away")
    wait_for_others(Path(run.output_dir))
    score = 1 - abs(run.algorithm.kl_coef - 0.1)
    folder = Path(run.output_dir)
    (folder / "metrics.csv").write_text(f"reward/score,step,epoch\n{score},0,0\n")


def wait_for_others(folder: Path) -> None:
    """Until as many jobs as TOGETHER says are here at once."""
    (folder / "process").write_text(str(os.getpid()))
    deadline = time.monotonic() + 120
    while len(list(folder.parent.glob("*/process"))) < int(os.environ.get("TOGETHER", "1")):
        if time.monotonic() > deadline:
            raise RewardError("no other job is here")
        time.sleep(0.05)


if __name__ == "__main__":
    recipe_main("ppo", PPORun, job)
