"""What runs in the process of a rank that a notebook started."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.trainer.call import _call_and_handle_interrupt
from lightning.pytorch.trainer.states import TrainerFn

from lightning_hybrid.errors import RankLostError
from lightning_hybrid.strategy.messages import Call, Failed, Stopped
from lightning_hybrid.strategy.results import Job, KeepWeights, Results, as_bytes

_notebook: Connection | None = None
"""to the process that started this one"""


def in_notebook(function: Callable[..., None], *args: Any) -> None:
    """Call a function in the process that the user's cells run in: here, or where this rank was started from."""
    if _notebook is None:
        function(*args)
    else:
        _notebook.send(Call(as_bytes((function, args))))


def main(descriptor: int, folder: str) -> None:
    """Do the job in ``folder``; rank 0 leaves the results there.

    Args:
        descriptor: of the pipe to the notebook.
        folder: of the job.
    """
    global _notebook
    _notebook = Connection(descriptor, readable=False)
    threading.Thread(target=_end_with_notebook, daemon=True).start()
    try:
        job = Job.read(Path(folder))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _do(job, Path(folder))
    except (SystemExit, KeyboardInterrupt):  # Lightning and StopOnSignal end a process so
        _notebook.send(Stopped())
        sys.exit(1)
    except BaseException as error:
        _notebook.send(_failure(error))
        sys.exit(1)


def _do(job: Job, folder: Path) -> None:
    trainer = job.trainer
    job.states.restore()
    _set_num_threads_if_needed(num_processes=trainer.strategy.num_processes)  # type: ignore[attr-defined]
    trainer.strategy._launcher = None  # all processes are there
    keep = KeepWeights()
    if trainer.state.fn == TrainerFn.FITTING:
        trainer.callbacks.append(keep)  # type: ignore[attr-defined]
    returned = _call_and_handle_interrupt(trainer, job.function, *job.args, **job.kwargs)
    if trainer.is_global_zero:
        Results.of(trainer, returned, keep.weights).write(folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads would end the process while others still talk to it


def _failure(error: BaseException) -> Failed:
    text = "".join(traceback.format_exception(error))
    return Failed(
        pickled=_copy_of(error),
        described=f"{type(error).__name__}: {error}",
        traceback=f"in rank {os.environ['LOCAL_RANK']}:\n{text}",
        follows=isinstance(error, RankLostError),
    )


def _copy_of(error: BaseException) -> bytes | None:
    """The error as bytes, if it can be read from them; errors with arguments of their own often cannot."""
    try:
        pickled = as_bytes(error)
        pickle.loads(pickled)
    except Exception:
        return None
    return pickled


def _end_with_notebook() -> None:
    """Nobody waits for this rank any more when the process that started it has gone."""
    os.read(sys.stdin.fileno(), 1)  # past Python's buffer, which the end of the process needs
    os._exit(1)
