"""Ranks that are killed: in every phase, while a checkpoint is written, and whenever it happens."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.harms import Fault
from tests.faults.trials import RANKS, Laboratory, Setting, assert_blames, drawn, setting_of

KILLED = -signal.SIGKILL
PHASES = ("rollout", "reward", "experience", "update")


@pytest.mark.parametrize(
    ("phase", "stage"), [("update", 2), *(pytest.param(p, 3, marks=pytest.mark.slow) for p in PHASES)]
)
def test_all_ranks_killed_in_a_phase(phase: str, stage: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("all killed", phase, stage)
    with laboratory.trial("kill -9 of all ranks in a phase", tmp_path, Setting(stage)) as trial:
        ended = trial.run(Fault("kill_all", phase, chance.randrange(1, 8), rank=chance.choice(RANKS)))
        assert [rank.code for rank in ended] == [KILLED, KILLED]
        trial.finish()


@pytest.mark.parametrize(
    ("phase", "lost"),
    [("reward", 1), *(pytest.param(p, r, marks=pytest.mark.slow) for p in PHASES for r in RANKS)],
)
def test_a_rank_killed_in_a_phase(phase: str, lost: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("killed", phase, lost)
    setting = Setting(2) if (phase, lost) == ("reward", 1) else setting_of(chance)
    when = chance.choice(("before", "after"))
    with laboratory.trial("kill -9 of one rank in a phase", tmp_path, setting) as trial:
        ended = trial.run(Fault("kill", phase, chance.randrange(1, 8), rank=lost, when=when))
        assert ended[lost].code == KILLED
        assert_blames(ended[1 - lost], lost)
        trial.finish()


# What happens to which rank while a checkpoint is written: rank 0 alone begins, completes and removes.
WRITING = [
    ("kill", "folder", "before", 0),
    ("kill", "folder", "after", 0),
    ("kill", "file", "before", 1),
    ("tear", "file", "after", 0),
    ("tear", "file", "after", 1),
    ("kill_all", "file", "after", 1),
    ("kill", "manifest", "before", 0),
    ("tear", "manifest", "after", 0),
    ("kill_all", "manifest", "after", 0),
    ("kill", "rename", "before", 0),
    ("kill", "rename", "after", 0),
    ("kill_all", "rename", "after", 0),
    ("kill", "link", "before", 0),
    ("kill", "link", "after", 0),
    ("kill", "removal", "before", 0),
    ("remove_half", "removal", "before", 0),
]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "beside training"])
@pytest.mark.parametrize(("act", "point", "when", "lost"), WRITING)
def test_killed_while_a_checkpoint_is_written(
    act: str, point: str, when: str, lost: int, asynchronous: bool, laboratory: Laboratory, tmp_path: Path
) -> None:
    chance = drawn("writing", act, point, when, lost, asynchronous)
    kind = f"kill -9 while a checkpoint is written{' beside training' if asynchronous else ''}"
    call = chance.randrange(3) if point == "file" else 0
    step = chance.choice((2, 4, 6))
    if point == "removal":  # of the first checkpoint, once the third is complete
        step = 8 if asynchronous else 6
    with laboratory.trial(kind, tmp_path, setting_of(chance), asynchronous) as trial:
        ended = trial.run(Fault(act, point, step, rank=lost, when=when, call=call))
        assert ended[lost].code == KILLED, ended[lost]
        if act != "kill_all":
            assert_blames(ended[1 - lost], lost)
        last = trial.place.checkpoints / "last.ckpt"
        assert last.exists() or not last.is_symlink(), f"{last} leads to {last.readlink()}, which is not there"
        trial.finish()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(seed: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("any moment", seed)
    setting = setting_of(chance)
    lost = chance.choice(((0,), (1,), (0, 1)))
    kind = f"kill -9 of {'one rank' if len(lost) == 1 else 'all ranks'} at a random moment"
    with laboratory.trial(kind, tmp_path, setting, asynchronous=chance.random() < 0.3) as trial:
        ranks = trial.start()
        ranks.await_files("began-0", "began-1")
        time.sleep(chance.uniform(0.0, laboratory.reference(setting).seconds()))
        ranks.send(signal.SIGKILL, *lost)
        ended = ranks.await_end(21.0)
        for survivor in set(RANKS) - set(lost):
            if ended[survivor].code != 0:
                assert_blames(ended[survivor], *lost)
        trial.finish()
