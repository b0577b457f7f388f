"""What runs in each worker: the recipe's function, with the ranks, the folder and the environment of the run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from lightning_hybrid.assemble import use_environment
from lightning_hybrid.callbacks.interruption import Interrupted
from lightning_hybrid.callbacks.signals import hear_from
from lightning_hybrid.clusters.beginning import Mark, begin
from lightning_hybrid.clusters.environment import Place, RayEnvironment, place_in_ray
from lightning_hybrid.clusters.lines import progress_in_lines
from lightning_hybrid.clusters.meeting import meet
from lightning_hybrid.clusters.order import Order
from lightning_hybrid.clusters.servers import RayStarter
from lightning_hybrid.clusters.stopping import Stop
from lightning_hybrid.config import Run
from lightning_hybrid.engines.agreement import of_all_ranks
from lightning_hybrid.errors import ConfigError, LightningHybridError
from lightning_hybrid.serving import use_starter


def task_of(order: Order) -> Callable[[], None]:
    """What Ray Train is to call in every worker."""

    def task() -> None:
        work(order)

    return task


def work(order: Order) -> None:
    """Do in this worker what the order says.

    Raises:
        LightningHybridError: as the recipe does.
    """
    place = place_in_ray()
    with _said_once(), progress_in_lines():
        os.environ.update(order.variables)
        _enter(order.folder, place)
        run = order.run()
        on_gpus = run.trainer.accelerator != "cpu"
        meet(place, timedelta(seconds=run.strategy.timeout_seconds), on_gpus=on_gpus)
        run = begin(_as_placed(run, place), order.run_id)
        use_environment(RayEnvironment(place))
        use_starter(RayStarter(run.launcher, on_gpus=on_gpus))
        hear_from(Stop(Mark.of(run, order.run_id)).asked if place.rank == 0 else set)
        try:
            with suppress(Interrupted):  # the command was asked to end, and knows by what
                order.job(run)
        finally:
            hear_from(None)
            use_starter(None)
            use_environment(None)


def _as_placed(run: Run, place: Place) -> Run:
    """The Trainer's devices and nodes as Ray has placed the ranks; a collective."""
    nodes = len(set(of_all_ranks(place.node_rank)))
    trainer = run.trainer.model_copy(update={"devices": place.local_world_size, "num_nodes": nodes})
    return run.model_copy(update={"trainer": trainer})


def _enter(folder: str, place: Place) -> None:
    """Relative paths mean the same as in the shell of the command."""
    try:
        os.chdir(folder)
    except OSError as error:
        host = socket.gethostname()
        raise ConfigError(
            f"rank {place.rank} on {host} cannot enter '{folder}', in which the command was given: {error}. Give it in "
            "a folder that all nodes have"
        ) from error


@contextmanager
def _said_once() -> Iterator[None]:
    """An error of ours is for the driver to say: without Ray's account of where it was raised."""
    try:
        yield
    except LightningHybridError:
        if os.environ.get("HYDRA_FULL_ERROR") != "1":
            logging.getLogger("ray.train").setLevel(logging.CRITICAL + 1)
        raise
