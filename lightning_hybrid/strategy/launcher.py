"""Starting the other ranks of this machine, and saying how one of them ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_hybrid.strategy.checkpoint import GRACE_SECONDS
from lightning_hybrid.strategy.liveness import PATIENCE, write_to_stderr

INTERVAL = 0.5
# Seconds for this rank to end by its own error after another one failed: to find the reason, to give up a checkpoint
# that is being written, and for the rest.
GRACE = PATIENCE + GRACE_SECONDS + 30.0
_IN_USE = threading.Event()  # while a Trainer of this process needs the others


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's own, but this process is not killed within seconds of another rank's end: it may say what happened.

    Attributes:
        exits: by rank, how a process started here failed.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.exits: dict[int, str] = {}

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            first = self.cluster_environment.node_rank() * self.num_processes + 1
            threading.Thread(target=_observe, args=(self.procs, first, self.exits), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        _IN_USE.set()
        try:
            return function(*args, **kwargs)
        finally:
            _IN_USE.clear()


def _observe(processes: list[subprocess.Popen[bytes]], first: int, exits: dict[int, str]) -> None:
    """Note how processes fail; after the first one, this process and all others have :data:`GRACE` to end.

    This one may be past all training by then, and do something that needs no other.
    """
    while not exits:
        time.sleep(INTERVAL)
        codes = [process.poll() for process in processes]
        exits.update({first + i: how_it_ended(code) for i, code in enumerate(codes) if code})
        if all(code == 0 for code in codes):
            return
    write_to_stderr("; ".join(f"rank {rank} {how}" for rank, how in exits.items()))
    time.sleep(GRACE)
    for process in processes:
        process.kill()
    _IN_USE.wait()
    os.kill(os.getpid(), signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """The exit code of a process in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    names = {known.value: known.name for known in signal.Signals}  # most real-time signals have none
    return f"was killed by {names.get(-code, f'signal {-code}')}"
