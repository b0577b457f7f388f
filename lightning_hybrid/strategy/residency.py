"""Who is on the device: generation, scoring and training own it in turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lightning_hybrid.config import SleepConfig
from lightning_hybrid.engines.agreement import agree, number_of_ranks, own_rank
from lightning_hybrid.engines.belongings import Belonging, frozen_belongings, trained_belongings
from lightning_hybrid.engines.memory import out_of_memory_in, readable, requested_bytes, resident_bytes
from lightning_hybrid.engines.sleep import Sleeper, give_own_storage, storage_of
from lightning_hybrid.errors import MemoryExhaustedError, StrategyError
from lightning_hybrid.strategy.watch import Watch

Phase = Literal["generate", "score", "train"]
LISTED = 5  # owners that an error names


class Residency:
    """Put to sleep what a phase does not need, then wake what it needs: two phases are never on the device together.

    What a phase needs: ``generate`` the weights of what it runs and the KV cache, ``score`` the weights of what it
    runs, ``train`` all that the trained engines hold. Between phases, and where a phase is None, weights of trained
    models are awake, since callbacks and hooks read them; all else that may sleep sleeps.

    Engines that sleep refuse to run, with an error that says so.

    Args:
        engines: the trained ones, by name.
        frozen: models without an optimizer, by name.
        settings: what may sleep.
        device: whose memory is to be freed.
    """

    def __init__(
        self,
        engines: Mapping[str, Any],
        frozen: Mapping[str, nn.Module],
        settings: SleepConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.belongings = [b for name, engine in engines.items() for b in trained_belongings(name, engine)]
        self.belongings += [b for name, model in frozen.items() for b in frozen_belongings(name, model)]
        chosen = {name for name, on in (settings or SleepConfig()).model_dump().items() if on}
        self._may_sleep = [belonging for belonging in self.belongings if belonging.setting in chosen]
        self._sleeper = Sleeper(self.device)
        self._watch = Watch({**engines, **frozen})
        self._names = {*engines, *frozen}

    def enter(self, phase: Phase | None, runs: Collection[str] = ()) -> None:
        """Make the device the phase's own. All ranks call it; alone, or where nothing may sleep, nothing is sent.

        Args:
            phase: what is about to begin; None for nothing.
            runs: names of the engines and frozen models whose weights it reads.

        Raises:
            MemoryExhaustedError: on every rank, where one rank's memory or host memory did not suffice. What sleeps
                keeps its values and can be woken again.
        """
        unknown = set(runs) - self._names
        if self._names and unknown:
            raise StrategyError(f"phase {phase!r} runs {sorted(unknown)}; there are: {sorted(self._names)}")
        if not self._may_sleep:
            return
        agree(None)  # no rank still works on the last phase
        needed = [belonging for belonging in self.belongings if _needs(phase, runs, belonging)]
        failure: MemoryExhaustedError | None = None
        try:
            self._put_to_sleep(needed, phase)
            self._wake(needed)
        except Exception as error:
            if out_of_memory_in(error) is None:
                raise
            failure = self.exhausted(error, str(phase), phase, runs)
            failure.__cause__ = error
        _agree(failure, f"making room for phase {phase!r}")

    def wake_all(self) -> None:
        """Wake everything, for whoever reads or writes engines as a whole, such as checkpoints; no collective.

        Raises:
            MemoryExhaustedError: if the memory does not suffice for all at once. The rest sleeps on.
        """
        if self._sleeper.empty:
            return
        try:
            self._wake(self.belongings)
        except Exception as error:
            raise self._explained(error, "waking all that sleeps") from error

    def close(self) -> None:
        """Make everything readable at the end of a run: weights where they were if there is room, the rest on the host.

        Engines are done with what they needed beside their weights, and Lightning moves it to the host anyway.
        """
        try:
            self._wake([belonging for belonging in self.belongings if belonging.kind == "weights"])
        except Exception as error:
            if out_of_memory_in(error) is None:
                raise
        for belonging in self.belongings:
            self._sleeper.settle(belonging.tensors())
            self._watch.allow(belonging)
        self.belongings, self._may_sleep = [], []
        self._sleeper, self._watch = Sleeper(self.device), Watch({})  # host buffers and modules are nobody's now

    def bytes(self) -> dict[str, int]:
        """What each owner, such as ``actor/optimizer``, holds on the device now; 0 for what sleeps."""
        return resident_bytes(self.belongings, self.device)

    def exhausted(
        self, error: BaseException, name: str, phase: Phase | None, runs: Collection[str], remedies: Sequence[str] = ()
    ) -> MemoryExhaustedError:
        """An error that says who holds the memory, and what would help.

        Args:
            error: a failed allocation, or what was raised from one.
            name: of the phase, as users know it.
            phase: which of the three it is.
            runs: names of the engines and frozen models that run in it.
            remedies: what may be done in the phase itself.
        """
        sleep = [f"set strategy.sleep.{setting}=true" for setting in self._helpful(phase, runs)]
        help_ = f". To need less: {', or '.join([*remedies, *sleep])}" if remedies or sleep else ""
        exhausted = MemoryExhaustedError(self._who_holds(error, f"phase {name!r}") + help_)
        exhausted.on_every_rank = getattr(error, "on_every_rank", False)
        return exhausted

    def _helpful(self, phase: Phase | None, runs: Collection[str]) -> list[str]:
        """Settings that would free memory in a phase and are off, the largest gain first."""
        gains: dict[str, int] = {}
        held = self.bytes()
        for belonging in self.belongings:
            # Host memory is the device's on a CPU: only what is given up leaves it.
            frees = self.device.type != "cpu" or belonging.content != "values"
            if frees and belonging not in self._may_sleep and not _needs(phase, runs, belonging):
                gains[belonging.setting] = gains.get(belonging.setting, 0) + held.pop(belonging.owner, 0)
        return sorted((setting for setting, gain in gains.items() if gain), key=lambda setting: -gains[setting])

    def _explained(self, error: Exception, what: str) -> Exception:
        if out_of_memory_in(error) is None:
            return error
        explained = MemoryExhaustedError(self._who_holds(error, what))
        explained.__cause__ = error
        return explained

    def _who_holds(self, error: BaseException, what: str) -> str:
        asked = requested_bytes(out_of_memory_in(error) or error)
        size = "" if asked is None else f": {readable(asked)} were asked for"
        held = sorted(self.bytes().items(), key=lambda item: -item[1])[:LISTED]
        owners = ", ".join(f"{owner} {readable(held_bytes)}" for owner, held_bytes in held if held_bytes)
        return f"rank {own_rank()} ran out of memory in {what}{size}. On {self.device} are {owners or 'no engines'}"

    def _put_to_sleep(self, needed: Sequence[Belonging], phase: Phase | None) -> None:
        # A storage may have several owners, such as the base of an adapter and a frozen model.
        kept = {storage_of(tensor) for belonging in needed for tensor in belonging.tensors()}
        for belonging in self._may_sleep:
            if belonging in needed or not belonging.ready():
                continue
            tensors = [tensor for tensor in belonging.tensors() if storage_of(tensor) not in kept]
            give_own_storage(tensors)  # also of what was loaded since: files are mapped
            if belonging.content is None:
                belonging.moved()
            elif self._sleeper.sleep(tensors, belonging.content):
                belonging.moved()
                self._watch.refuse(belonging, phase)

    def _wake(self, needed: Sequence[Belonging]) -> None:
        for belonging in needed:
            self._sleeper.wake(belonging.tensors())
            self._watch.allow(belonging)


def _agree(failure: MemoryExhaustedError | None, what: str) -> None:
    """Raise on every rank where one failed; alone, what it failed with."""
    if failure is not None and number_of_ranks() == 1:
        raise failure
    agree(failure, what, MemoryExhaustedError)


def _needs(phase: Phase | None, runs: Collection[str], belonging: Belonging) -> bool:
    if belonging.kind == "weights":
        return belonging.engine in runs or (belonging.setting == "weights" and phase in (None, "train"))
    return phase == ("generate" if belonging.kind == "kv_cache" else "train")


def refuse_without_phases(module: nn.Module | None, settings: SleepConfig) -> None:
    """Refuse to let engines sleep under a module that never says which phase begins: nothing would wake them.

    Raises:
        StrategyError: naming the module and the settings.
    """
    chosen = [f"strategy.sleep.{name}" for name, on in settings.model_dump().items() if on]
    if chosen and not hasattr(module, "phases"):
        raise StrategyError(
            f"{', '.join(chosen)} cannot be used with {type(module).__name__}, whose training has no phases in which "
            "anything could sleep: leave strategy.sleep out, or give the module `phases` that call "
            "strategy.residency.enter, as PPOModule does"
        )
