"""Ranks that stand still: for good, which the others notice, or for a second, which nobody does."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.harms import Fault
from tests.faults.job import TIMEOUT
from tests.faults.trials import GRACE, RANKS, WHOLE, Laboratory, assert_blames, drawn, setting_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stopped", RANKS)
@pytest.mark.parametrize("point", ["rollout", "reward", "update", "file"])
def test_a_rank_stopped_for_good(point: str, stopped: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("stopped", point, stopped)
    step = chance.choice((2, 4, 6)) if point == "file" else chance.randrange(1, 8)
    with laboratory.trial("SIGSTOP of one rank for good", tmp_path, setting_of(chance)) as trial:
        ranks = trial.start(Fault("stop", point, step, rank=stopped))
        assert ranks.await_files(f"harm-{stopped}")
        (survivor,) = ranks.await_end(TIMEOUT + GRACE, 1 - stopped)
        assert_blames(survivor, stopped)
        trial.took(survivor.at - float((tmp_path / f"harm-{stopped}").read_text()))
        ranks.end()
        trial.finish()


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_stopped_for_a_second(seed: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("paused", seed)
    setting, stopped = setting_of(chance), chance.choice(((0,), (1,), (0, 1)))
    with laboratory.trial("SIGSTOP and SIGCONT after 1 s", tmp_path, setting) as trial:
        ranks = trial.start()
        assert ranks.await_files("began-0", "began-1")
        time.sleep(chance.uniform(0.0, 0.8 * laboratory.reference(setting).seconds()))
        ranks.send(signal.SIGSTOP, *stopped)
        time.sleep(1.0)
        ranks.send(signal.SIGCONT, *stopped)
        assert [rank.code for rank in ranks.await_end(WHOLE)] == [0, 0]
