"""Signals that ask a run to stop, at any moment, to one rank or to all."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.job import TIMEOUT
from tests.faults.trials import GRACE, RANKS, Laboratory, Setting, drawn, setting_of

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "seed"),
    [
        (signal.SIGTERM, 0),
        *(
            pytest.param(n, s, marks=pytest.mark.slow)
            for n in NUMBERS
            for s in range(6)
            if (n, s) != (signal.SIGTERM, 0)
        ),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_signal_at_any_moment(number: signal.Signals, seed: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn(number.name, seed)
    setting = setting_of(chance) if seed else Setting(2)
    told = chance.choice(((0,), (1,), (0, 1)))
    kind = f"{number.name} to {'one rank' if len(told) == 1 else 'all ranks'}"
    with laboratory.trial(kind, tmp_path, setting, asynchronous=seed == 6) as trial:
        ranks = trial.start()
        assert ranks.await_files("began-0", "began-1")
        time.sleep(chance.uniform(0.0, 0.8 * laboratory.reference(setting).seconds()))
        ranks.send(number, *told)
        ended = ranks.await_end(TIMEOUT + GRACE)
        if not all((tmp_path / f"done-{rank}").exists() for rank in RANKS):
            code = 130 if number == signal.SIGINT else 0
            assert [rank.code for rank in ended] == [code, code], "\n".join(map(str, ended))
            assert f"checkpoint: {trial.place.newest()}" in ended[0].err
            assert not any("Traceback" in rank.err for rank in ended)
        trial.finish()
