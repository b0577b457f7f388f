"""Checkpoints that are not what was written: refused by the name of the file, with an older one offered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hybrid.checkpoint import newest_complete
from tests.faults.harms import Fault
from tests.faults.ranks import Ended
from tests.faults.trials import RANKS, Laboratory, Setting, Trial, drawn, offered, setting_of


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


Harm = Callable[[Path], None]
HARMS: list[tuple[str, Harm, str]] = [
    ("flipped bit", flip, "engines/*/rank-*"),
    ("truncated", truncate, "engines/*/rank-*"),
    ("missing", Path.unlink, "engines/*/*"),
    ("flipped bit", flip, "lightning.ckpt"),
    ("flipped bit", flip, "streams/*"),
    ("flipped bit", flip, "manifest.json"),
    ("truncated", truncate, "manifest.json"),
    ("missing", Path.unlink, "manifest.json"),
]


def interrupted(trial: Trial, harm: Harm, pattern: str, seed: object) -> Path:
    """Kill a run after step 6, and harm a file of its newest checkpoint; that file."""
    trial.run(Fault("kill_all", "update", 7, rank=0))
    newest = trial.place.newest()
    assert newest.name == "step=000006.ckpt"
    path = drawn(seed).choice(sorted(newest.glob(pattern)))
    harm(path)
    return path


def assert_refused(ended: list[Ended], path: Path) -> None:
    for rank in ended:
        assert rank.code == 1, rank
        assert "CheckpointError" in rank.err, rank
        assert "is refused" in rank.err, rank
        assert path.name in rank.err, rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "harm", "pattern", "stage"),
    [(*harmed, stage) for stage, harmed in enumerate(HARMS)],
)
def test_a_harmed_checkpoint(
    name: str, harm: Harm, pattern: str, stage: int, laboratory: Laboratory, tmp_path: Path
) -> None:
    with laboratory.trial(f"newest checkpoint harmed: {name}", tmp_path, Setting(stage % 4)) as trial:
        path = interrupted(trial, harm, pattern, (name, pattern))
        harmed = tmp_path / "checkpoints" / "step=000006.ckpt"
        ended = trial.run(resume=str(harmed))
        assert_refused(ended, path)
        older = offered(ended)
        assert older == str(tmp_path / "checkpoints" / "step=000004.ckpt")
        trial.finish(resume=older)


@pytest.mark.slow
@pytest.mark.parametrize(("act", "call"), [("kill", 0), ("kill_all", 0), ("kill", 1)])
@pytest.mark.parametrize(("name", "harm", "pattern"), [HARMS[0], HARMS[7]], ids=["flipped", "no manifest"])
def test_killed_between_the_renames_that_replace_it(
    name: str, harm: Harm, pattern: str, act: str, call: int, laboratory: Laboratory, tmp_path: Path
) -> None:
    chance = drawn("replaced", name, act, call)
    with laboratory.trial("kill -9 between two renames", tmp_path, setting_of(chance)) as trial:
        interrupted(trial, harm, pattern, (name, pattern))
        older = str(tmp_path / "checkpoints" / "step=000004.ckpt")
        trial.run(Fault(act, "rename", 6, rank=0, call=call, when="after"), resume=older)
        ended = trial.run()
        if any(rank.code for rank in ended):
            # Of a checkpoint that looks whole only a resume finds out.
            assert_refused(ended, tmp_path / "checkpoints" / "step=000006.replaced.ckpt")
            trial.finish(resume=offered(ended))


@pytest.mark.slow
@pytest.mark.parametrize("lost", RANKS)
def test_nothing_complete_yet(lost: int, laboratory: Laboratory, tmp_path: Path) -> None:
    with laboratory.trial("kill -9 before the first checkpoint", tmp_path, Setting(3)) as trial:
        trial.run(Fault("kill", "file", 2, rank=lost))
        assert newest_complete(tmp_path / "checkpoints") is None
        trial.finish()
