"""A trial: a run comes to harm, goes on from its newest complete checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from lightning_hybrid.checkpoint import newest_complete
from tests.checkpoint.runs import CLOCKS, prompt_file
from tests.faults.harms import Fault
from tests.faults.job import STEPS, TIMEOUT
from tests.faults.ranks import WORLD_SIZE, Ended, ForkServer, Ranks

GRACE = 15.0  # seconds beyond the strategy's timeout, in which the last rank must have ended
WHOLE = 120.0  # seconds for a run, on a machine with much else to do
RANKS = range(WORLD_SIZE)
BLAME = r"rank {}\b(?! \().*(not been heard of|is gone|stopped: |has ended|alive but has been|Error: )"


@dataclass(frozen=True)
class Setting:
    """What is the same in a run, its resumed parts and the uninterrupted run."""

    stage: int = 2
    lora: bool = False
    poison: tuple[Fault, ...] = ()


@dataclass
class Outcomes:
    """Of each kind of harm, how many trials there were, how many were survived with nothing lost, and how soon.

    Attributes:
        ends: seconds from a harm to the end of the last rank, where the harm knows its moment.
    """

    tried: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    ends: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def table(self) -> list[str]:
        lines = [f"{'kind':<54}{'trials':>7}{'survived':>10}{'lost':>6}{'slowest end':>13}"]
        for kind in sorted(self.tried):
            slowest = f"{max(self.ends[kind]):.1f} s" if self.ends[kind] else ""
            lines.append(self._line(kind, self.tried[kind], self.survived[kind]) + f"{slowest:>13}")
        return [*lines, self._line("all", self.tried.total(), self.survived.total())]

    @staticmethod
    def _line(kind: str, tried: int, survived: int) -> str:
        return f"{kind:<54}{tried:>7}{survived:>10}{tried - survived:>6}"


class Place:
    """A folder in which a run runs, and what it left there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        if not (folder / "prompts.txt").exists():
            prompt_file(folder)

    def diary(self, rank: int) -> list[tuple[int, str]]:
        """Each step that was finished, as often as it was, with all that it logged and sampled."""
        path = self.folder / f"diary-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(json.loads(line)["step"], line) for line in lines]

    def digests(self) -> list[str]:
        """Of the weights of actor and critic, as each rank has them at the end."""
        return [(self.folder / f"done-{rank}").read_text() for rank in RANKS]

    def history(self) -> list[dict[str, str]]:
        """The rows of ``metrics.csv`` without what a clock measures."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in csv.DictReader(file)]

    def samples(self) -> str:
        return (self.folder / "samples.jsonl").read_text()

    def newest(self) -> Path:
        newest = newest_complete(self.checkpoints)
        assert newest is not None, f"no complete checkpoint in {sorted(self.checkpoints.glob('*'))}"
        return newest

    def seconds(self) -> float:
        """From the first step's beginning to the end of training."""
        began, done = (self.folder / name for name in ("began-0", "done-0"))
        return done.stat().st_mtime - began.stat().st_mtime


class Laboratory:
    """Starts trials, and keeps the uninterrupted runs that they are compared with.

    Args:
        server: that starts ranks.
        folder: of the uninterrupted runs.
        outcomes: to be added to.
    """

    def __init__(self, server: ForkServer, folder: Path, outcomes: Outcomes) -> None:
        self.server, self.folder, self.outcomes = server, folder, outcomes
        self._references: dict[Setting, Place] = {}

    def reference(self, setting: Setting) -> Place:
        """The uninterrupted run, with a checkpoint of every second step."""
        if setting not in self._references:
            folder = self.folder / str(len(list(self.folder.iterdir())))
            folder.mkdir()
            whole = Trial(self, "", Place(folder), setting)
            _assert_good(whole.run(keep=STEPS))
            self._references[setting] = whole.place
        return self._references[setting]

    @contextmanager
    def trial(self, kind: str, folder: Path, setting: Setting, asynchronous: bool = False) -> Iterator[Trial]:
        """A run to be harmed within the block, at whose end it must have ended as the uninterrupted one."""
        self.reference(setting)
        trial = Trial(self, kind, Place(folder), setting, asynchronous)
        self.outcomes.tried[kind] += 1
        try:
            yield trial
            trial.assert_as_uninterrupted()
        finally:
            trial.end()
        self.outcomes.survived[kind] += 1


class Trial:
    """A run that is launched as often as it takes."""

    def __init__(
        self, laboratory: Laboratory, kind: str, place: Place, setting: Setting, asynchronous: bool = False
    ) -> None:
        self.laboratory, self.kind, self.place = laboratory, kind, place
        self.setting, self.asynchronous = setting, asynchronous
        self._started: list[Ranks] = []

    def start(self, *faults: Fault, **changes: Any) -> Ranks:
        """Launch it; it goes on from the newest complete checkpoint."""
        arguments = {
            "folder": str(self.place.folder),
            "stage": self.setting.stage,
            "lora": self.setting.lora,
            "asynchronous": self.asynchronous,
            "faults": [fault.plain() for fault in (*self.setting.poison, *faults)],
        }
        ranks = Ranks(self.laboratory.server, self.place.folder, "train", arguments | changes)
        self._started.append(ranks)
        return ranks

    def run(self, *faults: Fault, **changes: Any) -> list[Ended]:
        """Launch it and wait until all ranks have ended, which after a harm must not take longer than stated."""
        ranks = self.start(*faults, **changes)
        try:
            harm = f"harm-{faults[0].rank or 0}" if faults else ""
            if not harm or not ranks.await_files(harm, limit=WHOLE):
                return ranks.await_end(WHOLE)
            ended = ranks.await_end(TIMEOUT + GRACE)
            self.took(max(rank.at for rank in ended) - float((self.place.folder / harm).read_text()))
            return ended
        finally:
            ranks.end()

    def took(self, seconds: float) -> None:
        """So long a harm took to end the run."""
        self.laboratory.outcomes.ends[self.kind].append(seconds)

    def finish(self, **changes: Any) -> None:
        """Let it go on to its end, unharmed."""
        _assert_good(self.run(**changes))

    def assert_as_uninterrupted(self) -> None:
        """Weights, metrics, samples and history are those of the uninterrupted run, in steps that were redone too."""
        place, reference = self.place, self.laboratory.reference(self.setting)
        for rank in RANKS:
            expected = dict(reference.diary(rank))
            assert sorted(expected) == list(range(1, STEPS + 1))
            found = place.diary(rank)
            assert {step for step, _ in found} == set(expected)
            for step, line in found:
                assert line == expected[step], f"rank {rank}, step {step}"
        assert place.digests() == reference.digests()
        assert place.samples() == reference.samples()
        assert place.history() == reference.history()

    def end(self) -> None:
        for ranks in self._started:
            ranks.end()


def _assert_good(ended: Sequence[Ended]) -> None:
    assert [rank.code for rank in ended] == [0] * WORLD_SIZE, "\n".join(map(str, ended))


def assert_blames(survivor: Ended, rank: int) -> None:
    """A rank has stopped by an error that names another one and the reason."""
    assert survivor.code in (1, 75), survivor
    assert re.search(BLAME.format(rank), survivor.err), survivor


def offered(ended: Sequence[Ended]) -> str:
    """The checkpoint that every rank offers in place of one that it refuses."""
    (path,) = {found for rank in ended for found in re.findall(r"give ckpt_path='(.*)'", rank.err)}
    return str(path)


def drawn(*seed: Any) -> Random:
    """Chance that is the same in every session."""
    return Random("/".join(map(str, seed)))


def setting_of(chance: Random) -> Setting:
    """Any ZeRO stage; adapters in a quarter of the trials."""
    return Setting(stage=chance.randrange(4), lora=chance.random() < 0.25)
