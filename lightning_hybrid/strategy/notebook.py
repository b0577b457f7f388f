"""Several ranks from a notebook: new processes, which get copies of the cells' objects and give back results.

A kernel cannot be forked: its copies would hang in the first parallel loop of PyTorch after one that the kernel had
run, and could not use a GPU that the kernel has used.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning import LightningDataModule, LightningModule
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_hybrid.errors import StrategyError
from lightning_hybrid.strategy.launcher import WatchedLauncher
from lightning_hybrid.strategy.rank_process import RankProcess, follow
from lightning_hybrid.strategy.results import Job, Results, Surroundings

if TYPE_CHECKING:
    import lightning.pytorch as pl

T = TypeVar("T")


class NotebookLauncher(_Launcher):
    """Run every rank in a new process, show here what they print, and bring back what they learned.

    What the Trainer was given is copied to the ranks; classes and functions of the notebook's own cells go along. When
    training ends, the module here gets the trained weights, its buffers, and what it keeps in checkpoints
    (``on_save_checkpoint``); the Trainer gets its metrics and its progress. Other attributes that the ranks changed on
    their copies are lost, and so is what callbacks collected, unless they wrote it to a file.

    An interrupt is passed on to the ranks, and leaves the module as it was before; a second one ends them at once.

    Args:
        processes: how many ranks.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._ranks: list[RankProcess] = []

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., T], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> T:
        """Call a function of the Trainer on every rank, and return what rank 0 returned.

        Raises:
            StrategyError: if an object cannot be copied to the ranks, or to predict, whose results each rank has a part
                of.
            ConfigError: if cloudpickle is not installed.
            KeyboardInterrupt: when the cell is interrupted.
        """
        assert trainer is not None
        if trainer.state.fn == TrainerFn.PREDICTING:
            raise StrategyError("each rank would predict a part of the data: predict with Trainer(devices=1)")
        _leave_earlier_runs(trainer, args)
        folder = Path(tempfile.mkdtemp(prefix="lightning-hybrid-"))
        try:
            Job(trainer, function, args, kwargs, Surroundings.capture()).write(folder)
            # The kernel may hold the port of a run of its own.
            launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "NODE_RANK": "0"}
            launch["WORLD_SIZE"] = str(self._processes)
            for rank in range(self._processes):
                self._ranks.append(RankProcess(rank, folder, {**launch, "LOCAL_RANK": str(rank)}))
            self._follow()
            results = Results.read(folder)
        finally:
            self._end()
            shutil.rmtree(folder)
        results.hand_over(trainer)
        return results.returned  # type: ignore[no-any-return]

    @override
    def kill(self, signum: int) -> None:
        """Send a signal to all ranks."""
        for rank in self._ranks:
            rank.signal(signum)

    def _follow(self) -> None:
        try:
            follow(self._ranks)
        except KeyboardInterrupt:
            print("interrupted: the ranks are stopping; once more to end them at once", file=sys.stderr)  # noqa: T201
            self.kill(signal.SIGINT)
            follow(self._ranks, stopping=True)
            raise

    def _end(self) -> None:
        for rank in self._ranks:
            rank.end()
        self._ranks = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ranks": []}


def _leave_earlier_runs(trainer: pl.Trainer, args: tuple[Any, ...]) -> None:
    """What is copied to the ranks holds no Trainer of an earlier run, with its engines."""
    for connected in (trainer.lightning_module, *args):
        if isinstance(connected, LightningModule | LightningDataModule):
            connected.trainer = trainer


def launcher_of(
    environment: ClusterEnvironment, processes: int, nodes: int, *, notebook: bool
) -> NotebookLauncher | WatchedLauncher | None:
    """None for a run that stays in this process.

    Args:
        environment: that may have started the processes already.
        processes: on this machine.
        nodes: machines.
        notebook: whether to start ranks from a notebook, also outside of one.
    """
    external = environment.creates_processes_externally
    if processes * nodes == 1 and not external:
        return None
    if (notebook or _IS_INTERACTIVE) and nodes == 1 and not external:
        return NotebookLauncher(processes)
    return WatchedLauncher(environment, processes, nodes)


def stay_interactive(trainer: pl.Trainer) -> None:
    """End an interrupted run in an interactive session, and leave the session as it was.

    Lightning would ignore interrupts from then on, and end the interpreter.

    Raises:
        KeyboardInterrupt: in an interactive session.
    """
    if not _IS_INTERACTIVE:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for logger in trainer.loggers:
        logger.finalize("failed")
    trainer._teardown()
    trainer.state.stage = None
    raise KeyboardInterrupt from None
