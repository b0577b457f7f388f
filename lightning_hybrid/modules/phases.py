"""Which phase of an iteration is running, how long each took, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lightning_hybrid.engines.memory import MIB, PeakMemory, out_of_memory_in
from lightning_hybrid.errors import MemoryExhaustedError
from lightning_hybrid.strategy.residency import Phase, Residency

if TYPE_CHECKING:
    from lightning_hybrid.strategy import HybridDeepSpeedStrategy

# Which of the three that own the device in turn each phase of an iteration is.
KINDS: dict[str, Phase] = {"rollout": "generate", "reward": "score", "experience": "score", "update": "train"}


class Phases:
    """Announce, time and measure the phases of an iteration, and make the device each one's own.

    Example::

        with phases("rollout", strategy.residency, runs=["actor"]):
            ...
        phases.seconds["rollout"]

    Attributes:
        seconds: that each phase took since :meth:`begin`.
        listeners: are told a phase's name before anything of it happens; one that raises stops the iteration there.
        memory: MiB in each phase since :meth:`begin`, on this rank: ``<phase>_peak_mib``, and
            ``<phase>/<owner>_mib`` for what each owner, such as ``actor/weights``, held on the device at its end.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.listeners: list[Callable[[str], None]] = []
        self.memory: dict[str, float] = {}

    def begin(self) -> None:
        """Begin an iteration, in which a phase may run several times."""
        self.seconds, self.memory = {}, {}

    @contextmanager
    def __call__(
        self,
        name: str,
        residency: Residency | None = None,
        runs: Collection[str] | None = None,
        remedies: Sequence[str] = (),
    ) -> Iterator[None]:
        """Run a block as the phase ``name``.

        Args:
            name: one of :data:`KINDS`, where a residency is given.
            residency: of the strategy.
            runs: names of the engines and frozen models that the block runs; None for a block that needs none of the
                device, for which nothing is moved.
            remedies: what to do where memory runs out in this phase, besides letting more sleep.

        Raises:
            MemoryExhaustedError: where it did, with who holds how much.
        """
        for listener in self.listeners:
            listener(name)
        begin = _now()
        try:
            if residency is None:
                yield
            else:
                with _explained(name, residency, runs or (), remedies):
                    if runs is not None:
                        residency.enter(KINDS[name], runs)
                    peak = PeakMemory(residency.device)
                    peak.start()
                    yield
                self._measure(name, residency, peak)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + _now() - begin

    def _measure(self, name: str, residency: Residency, peak: PeakMemory) -> None:
        key = f"{name}_peak_mib"
        self.memory[key] = max(self.memory.get(key, 0.0), peak.bytes() / MIB)
        for owner, held in residency.bytes().items():
            self.memory[f"{name}/{owner}_mib"] = held / MIB

    def memory_figures(self, strategy: HybridDeepSpeedStrategy) -> dict[str, float]:
        """:attr:`memory` as it is logged, the largest of all ranks; owners that held nothing in any phase are left out.

        All ranks call it.
        """
        if not self.memory:
            return {}
        names = list(self.memory)
        held = torch.tensor([self.memory[name] for name in names], dtype=torch.float64, device=strategy.root_device)
        largest = dict(zip(names, strategy.reduce(held, reduce_op="max").tolist(), strict=True))
        some = {_owner(name) for name, value in largest.items() if value}
        return {f"memory/{name}": value for name, value in largest.items() if _owner(name) in some}


@contextmanager
def _explained(name: str, residency: Residency, runs: Collection[str], remedies: Sequence[str]) -> Iterator[None]:
    """Let an allocation that fails say whose memory it is and what would help."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryExhaustedError) or out_of_memory_in(error) is None:
            raise
        raise residency.exhausted(error, name, KINDS[name], runs, remedies) from error


def _owner(name: str) -> str:
    """The owner in ``<phase>/<owner>_mib``; a figure without one is its own."""
    return name.partition("/")[2] or name


def _now() -> float:
    """Seconds, after the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
