"""Faults that a rank does to itself, at a point that is given by a function of the package, a step and a call of it."""

from __future__ import annotations

import functools
import importlib
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

# Where something can go wrong: a module, and what of it is wrapped.
POINTS = {
    "rollout": ("lightning_hybrid.modules.ppo", "PPOModule.roll_out"),
    "reward": ("tests.faults.job", "judge"),
    "experience": ("lightning_hybrid.modules.ppo", "critic_values"),
    "update": ("lightning_hybrid.modules.update", "PPOUpdate._apply"),
    "policy loss": ("lightning_hybrid.modules.update", "policy_loss"),
    "value loss": ("lightning_hybrid.modules.update", "value_loss"),
    "save": ("lightning_hybrid.checkpoint.save", "CheckpointWriter.save"),
    "folder": ("lightning_hybrid.checkpoint.folder", "begin"),
    "file": ("lightning_hybrid.checkpoint.save", "write_tensors"),
    "manifest": ("lightning_hybrid.checkpoint.save", "write_manifest"),
    "rename": ("pathlib", "Path.rename"),
    "link": ("lightning_hybrid.callbacks.links", "replace_link"),
    "removal": ("lightning_hybrid.checkpoint.save", "_remove"),
}
# These belong to the step at which a checkpoint was begun, also where it is written beside the steps after it.
OF_A_CHECKPOINT = ("folder", "file", "manifest", "rename", "link", "removal")


@dataclass(frozen=True)
class Fault:
    """What happens where.

    Attributes:
        act: a method of :class:`Harms`.
        point: one of :data:`POINTS`.
        step: steps that are done when it happens.
        rank: that it happens to; None for each.
        when: ``before`` or ``after`` the function.
        call: of the function in that step; None for every one.
        until: happens in each step before this one; by default in one step.
    """

    act: str
    point: str
    step: int
    rank: int | None = None
    when: str = "before"
    call: int | None = 0
    until: int | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class Harms(L.Callback):
    """Let faults happen on this rank; the moment is written to ``harm-<rank>`` in the run's folder."""

    def __init__(self, faults: Sequence[Fault], rank: int, place: Path) -> None:
        self.faults = [fault for fault in faults if fault.rank in (None, rank)]
        self.rank, self.place = rank, place
        self.trainer: L.Trainer | None = None
        self.saving_at = -1
        self.calls: Counter[tuple[str, int]] = Counter()
        if self.faults:
            for point in ("save", *{fault.point for fault in self.faults}):
                self._wrap(point)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer

    def _wrap(self, point: str) -> None:
        module, name = POINTS[point]
        owner: Any = importlib.import_module(module)
        *classes, name = name.split(".")
        for inner in classes:
            owner = getattr(owner, inner)
        setattr(owner, name, self._wrapped(point, getattr(owner, name)))

    def _wrapped(self, point: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            step = self._step(point)
            number = self.calls[point, step]
            self.calls[point, step] += 1
            due = [fault for fault in self.faults if fault.point == point and _is_due(fault, step, number)]
            for fault in due:
                if fault.when == "before":
                    self._happen(fault, None, args)
            result = function(*args, **kwargs)
            for fault in due:
                if fault.when == "after":
                    result = self._happen(fault, result, args)
            return result

        return call

    def _step(self, point: str) -> int:
        if point in OF_A_CHECKPOINT:
            return self.saving_at
        step = self.trainer.global_step if self.trainer is not None else -1
        if point == "save":
            self.saving_at = step
        return step

    def _happen(self, fault: Fault, result: Any, args: tuple[Any, ...]) -> Any:
        (self.place / f"harm-{self.rank}").write_text(str(time.time()))
        return getattr(self, fault.act)(result, args)

    # ---- acts --------------------------------------------------------------------------------------------------------

    def kill(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_all(self, *_: Any) -> None:
        for pid in sorted((int(path.read_text()) for path in self.place.glob("pid-*")), key=lambda p: p == os.getpid()):
            os.kill(pid, signal.SIGKILL)

    def tear(self, _: Any, args: tuple[Any, ...]) -> None:
        """Leave half of the file that was written, and die."""
        path = args[0] / "manifest.json" if args[0].is_dir() else args[0]
        os.truncate(path, path.stat().st_size // 2)
        self.kill()

    def remove_half(self, _: Any, args: tuple[Any, ...]) -> None:
        """Remove a part of a checkpoint that is due to be removed, and die."""
        next(path for path in sorted(args[0].rglob("*")) if path.is_file()).unlink()
        self.kill()

    def stop(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def fail(self, *_: Any) -> None:
        raise ValueError("out of order")

    def hang(self, *_: Any) -> None:
        time.sleep(10_000)

    def fill_disk(self, *_: Any) -> None:
        """No file can be longer than what a diary needs and a checkpoint does not."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    def want_too_much(self, *_: Any) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)

    def have_no_more(self, *_: Any) -> None:
        """What a phase wants beyond what the process has is refused by the system."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), before[1]))
        try:
            torch.zeros(256 << 20, dtype=torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def poison_loss(self, result: tuple[Tensor, Any], _: Any) -> tuple[Tensor, Any]:
        loss, metrics = result
        return loss * float("nan"), metrics

    def poison_gradients(self, result: tuple[Tensor, Any], _: Any) -> tuple[Tensor, Any]:
        loss, metrics = result
        poisoned: Tensor = _Poison.apply(loss)
        return poisoned, metrics


class _Poison(torch.autograd.Function):
    """A loss that is finite and whose gradients are not."""

    @staticmethod
    def forward(_: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def _is_due(fault: Fault, step: int, number: int) -> bool:
    until = fault.step + 1 if fault.until is None else fault.until
    return fault.step <= step < until and fault.call in (None, number)
