"""All peers in turn, several rounds, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module

from peers.base import Peer, Sample
from peers.measure import PeakMemory, bytes_to_read, now
from peers.subject import Subject
from peers.workload import Workload

# Module and class of each, in the order of the table; ratios are to the first.
PEERS = (
    ("native", "Native"),
    ("hf", "HFGenerate"),
    ("hybrid_engine_rollout", "HybridEngineRollout"),
    ("generate_batch", "GenerateBatch"),
    ("trl_grpo", "GRPORollout"),
    ("vllm", "VLLM"),
)
_PATIENCE = 60.0  # seconds; whoever took longer in the first round is not asked again


@dataclass(frozen=True)
class Round:
    """One rollout between two switches; seconds."""

    sample: Sample
    to_inference: float
    to_training: float


@dataclass
class Entry:
    """What is known about one peer.

    Attributes:
        name: as the table shows it.
        peer: None where it is absent.
        note: why there are no figures, or None.
        rounds: those that count.
        peak: bytes over the resting training state, or None where that cannot be known.
    """

    name: str
    peer: Peer | None
    note: str | None
    rounds: list[Round] = field(default_factory=list)
    peak: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens up to EOS over seconds, median of the rounds."""
        return statistics.median(_speed(r) for r in self.rounds)

    def median(self, figure: Callable[[Round], float]) -> float:
        """Median of a figure over the rounds."""
        return statistics.median(map(figure, self.rounds))

    def slower_than(self, first: Entry) -> float:
        """How many times as fast the first peer is: median of the ratios of the rounds."""
        pairs = zip(first.rounds, self.rounds, strict=False)
        return statistics.median(_speed(ours) / _speed(theirs) for ours, theirs in pairs)

    def roofline_share(self, workload: Workload, bandwidth: float) -> float:
        """Share of the time that reading the weights and the live cache alone would take, at ``bandwidth`` bytes/s."""
        model = self.peer.subject.causal_lm if self.peer else None
        return self.median(
            lambda r: bytes_to_read(model, workload.prompts, r.sample.responses) / bandwidth / r.sample.seconds
        )


def enter_peers(subject: Subject) -> list[Entry]:
    """An entry for every peer, with the reason for those that are absent."""
    return [_enter(getattr(import_module(f"peers.{module}"), name), subject) for module, name in PEERS]


def _enter(kind: type[Peer], subject: Subject) -> Entry:
    reason = kind.absent()
    if reason is not None:
        return Entry(kind.name, None, f"absent: {reason}")
    try:
        return Entry(kind.name, kind(subject), None)
    except Exception as error:  # one that cannot start leaves the others to be measured
        return Entry(kind.name, None, _failure(error))


def compare(entries: Iterable[Entry], workload: Workload, rounds: int, everything: bool) -> list[Entry]:
    """Measure each peer on the same workload, one after another in every round.

    Args:
        entries: from :func:`enter_peers`; they stay as they are.
        workload: what to ask for.
        rounds: that count, after a first one that does not, except for its memory.
        everything: also those that say they are too slow.
    """
    measured = [_fresh(entry, workload, everything) for entry in entries]
    for number in range(rounds + 1):
        for entry in measured:
            if entry.peer is not None and entry.note is None and not _too_slow(entry, number):
                _take_round(entry, workload, number)
    for entry in measured:
        if len(entry.rounds) > 1:
            entry.rounds.pop(0)
    return measured


def _fresh(entry: Entry, workload: Workload, everything: bool) -> Entry:
    slow = entry.peer.too_slow(workload) if entry.peer is not None and not everything else None
    return Entry(entry.name, entry.peer, entry.note or (f"left out: {slow}" if slow else None))


def _too_slow(entry: Entry, number: int) -> bool:
    return number > 0 and entry.rounds[0].sample.seconds > _PATIENCE


def _take_round(entry: Entry, workload: Workload, number: int) -> None:
    assert entry.peer is not None
    try:
        if number == 0:
            _run(entry.peer, workload.cut(2, 2), seed=0)  # imports, and what is built once
            memory = PeakMemory()
            with memory():
                entry.rounds.append(_run(entry.peer, workload, seed=0))
            entry.peak = None if memory.bytes is None else memory.bytes + entry.peer.held_bytes
        else:
            entry.rounds.append(_run(entry.peer, workload, seed=number))
    except Exception as error:
        if entry.peer.must_run:
            raise
        entry.note = _failure(error)


def _run(peer: Peer, workload: Workload, seed: int) -> Round:
    """Switch, roll out, switch back.

    What a peer prepares at its first call after a switch belongs to the switch: it is what a first small rollout takes
    longer than a second one.
    """
    begin = now()
    peer.enter()
    to_inference = now() - begin
    if peer.prepares:
        first, second = (peer.sample(workload.cut(2, 2), seed).seconds for _ in range(2))
        to_inference += max(0.0, first - second)
    sample = peer.sample(workload, seed)
    begin = now()
    peer.leave()
    return Round(sample, to_inference, now() - begin)


def _speed(one: Round) -> float:
    return one.sample.tokens / one.sample.seconds


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}".splitlines()[0]
