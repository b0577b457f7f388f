"""A run that comes to harm again and again still ends as the uninterrupted one."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from random import Random

import pytest

from lightning_hybrid.checkpoint import newest_complete
from lightning_hybrid.checkpoint.manifest import read_manifest
from tests.faults.harms import Fault
from tests.faults.job import EVERY, STEPS, TIMEOUT
from tests.faults.trials import GRACE, RANKS, Laboratory, Trial, drawn, setting_of

pytestmark = pytest.mark.slow


def harm(trial: Trial, chance: Random, seconds: float) -> None:
    """One of everything that can happen between here and the end."""
    newest = newest_complete(trial.place.checkpoints)
    begin = 0 if newest is None else int(read_manifest(newest)["global_step"])
    kind = chance.choice(("kill", "signal", "reward", "while saving"))
    if kind == "reward":
        trial.run(Fault("fail", "reward", chance.randrange(begin, STEPS), rank=chance.choice(RANKS)))
    elif kind == "while saving":
        point, when = chance.choice(("file", "manifest", "rename")), chance.choice(("before", "after"))
        trial.run(Fault("kill", point, EVERY * (1 + chance.randrange(begin, STEPS) // EVERY), rank=0, when=when))
    else:
        ranks = trial.start()
        ranks.await_files("began-0", "began-1")
        time.sleep(chance.uniform(0.0, seconds * (1 - begin / STEPS)))
        number = signal.SIGKILL if kind == "kill" else chance.choice((signal.SIGTERM, signal.SIGINT))
        ranks.send(number, *chance.choice(((0,), (1,), (0, 1))))
        ranks.await_end(TIMEOUT + GRACE)


@pytest.mark.parametrize("seed", range(8))
def test_harm_after_harm(seed: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("again and again", seed)
    setting = setting_of(chance)
    with laboratory.trial("up to 3 random harms in a row", tmp_path, setting, chance.random() < 0.3) as trial:
        harms = 0
        while harms < 3 and not all((tmp_path / f"done-{rank}").exists() for rank in RANKS):
            harm(trial, chance, laboratory.reference(setting).seconds())
            harms += 1
        trial.finish()
