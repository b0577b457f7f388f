"""Memory that runs out in a phase, and data that is changed between two parts of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harms import Fault
from tests.faults.trials import RANKS, Laboratory, Setting, assert_blames, drawn, setting_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("act", ["want_too_much", "have_no_more"])
@pytest.mark.parametrize("phase", ["rollout", "experience", "update"])
def test_memory_that_runs_out(phase: str, act: str, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("memory", phase, act)
    poor = chance.choice(RANKS)
    with laboratory.trial("out of memory in a phase", tmp_path, setting_of(chance)) as trial:
        ended = trial.run(Fault(act, phase, chance.randrange(1, 8), rank=poor))
        assert ended[poor].code == 1, ended[poor]
        assert "MemoryExhaustedError" in ended[poor].err, ended[poor]
        assert f"'{phase}'" in ended[poor].err, ended[poor]
        assert_blames(ended[1 - poor], poor)
        trial.finish()


@pytest.mark.parametrize("stage", [0, 3])
def test_data_that_was_changed(stage: int, laboratory: Laboratory, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    with laboratory.trial("data changed between the parts", tmp_path, Setting(stage)) as trial:
        trial.run(Fault("kill_all", "update", 5, rank=1))
        before = prompts.read_text()
        prompts.write_text(before.replace("mia", "ada", 1) if stage else before + "tom sees the farm .\n")
        for rank in trial.run():
            assert rank.code == 1, rank
            assert f"DataError: the data is not what this run began with:\n  {prompts}" in rank.err, rank
        prompts.write_text(before)
        trial.finish()
