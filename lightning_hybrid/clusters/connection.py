"""The cluster: Ray itself, one that runs already or one for this run, and whether it is large enough."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_hybrid.config import LauncherConfig
from lightning_hybrid.errors import ConfigError

TESTED = "2.60"
STORE_BYTES = 256 << 20  # of objects, of which a run has next to none; Ray's default is a third of the memory
NOT_INSTALLED = 'launcher=ray needs the package ray: pip install "lightning-hybrid[ray]"'
UNNOTICEABLE = 1e-6
KNOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Share:
    """What Ray sets aside for processes of one kind.

    Attributes:
        what: they are, for messages.
        count: of processes.
        cpus: for each.
        gpus: for each.
    """

    what: str
    count: int
    cpus: float
    gpus: float

    def resources(self) -> dict[str, float]:
        """Of one process, as Ray names them."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def import_ray(address: str | None) -> Any:
    """The package, at last.

    Args:
        address: of the cluster that it is for; None for one of this machine alone.

    Raises:
        ConfigError: if it, or its part for training, is not installed.
    """
    if address is None:
        # So Ray listens on loopback alone; it knows no other way to say so. The name is of where that is its default.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody was asked
    # Ray folds lines of several processes that look alike, for five seconds: progress would come late.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        import ray
        import ray.train.torch
    except ImportError as error:
        raise ConfigError(f"{NOT_INSTALLED} ({error})") from error
    if not ray.__version__.startswith(f"{TESTED}."):
        say(f"this is Ray {ray.__version__}; launcher=ray is tested with {TESTED}")
    return ray


@contextmanager
def connected(launcher: LauncherConfig) -> Iterator[Any]:
    """The package ray, connected to a cluster for a block; one that was connected before stays so.

    Raises:
        ConfigError: if there is no such cluster.
    """
    address = launcher.address or os.environ.get("RAY_ADDRESS") or None
    ray = import_ray(address)
    if ray.is_initialized():
        yield ray
        return
    try:
        _connect(ray, address)
    except Exception as error:  # Ray raises bare ones
        where = "start a cluster on this machine" if address is None else f"reach the cluster at '{address}'"
        raise ConfigError(f"launcher.address: cannot {where}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    if address is not None:
        _knock(address)
        ray.init(address=address, logging_level="warning", log_to_driver=True)
        return
    own = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    ray.init(address="local", logging_level="error", log_to_driver=True, **own)


def _knock(address: str) -> None:
    """Raise OSError where nobody listens, for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def has_gpus(ray: Any) -> bool:
    """Whether any node of the cluster has one."""
    return bool(ray.cluster_resources().get("GPU", 0.0) > 0)


def refuse_what_does_not_fit(ray: Any, shares: Sequence[Share]) -> None:
    """Check that the cluster, were it idle, could hold all processes.

    Raises:
        ConfigError: with what is demanded and what there is.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    problems = [problem for name in ("CPU", "GPU") for problem in _problems(name, shares, nodes, total)]
    if problems:
        demanded = "; ".join(
            f"{share.count} {share.what} with {share.cpus:g} CPU and {share.gpus:g} GPU each" for share in shares
        )
        raise ConfigError(
            f"the Ray cluster is too small: {', and '.join(problems)} (demanded: {demanded}; nodes: {len(nodes)}). "
            "Add nodes, or lower trainer.devices, trainer.num_nodes, launcher.cpus_per_rank or launcher.cpus_per_server"
        )


def _problems(
    name: str, shares: Sequence[Share], nodes: Sequence[Mapping[str, float]], total: Mapping[str, float]
) -> Iterator[str]:
    needed = sum(share.count * share.resources().get(name, 0.0) for share in shares)
    there = total.get(name, 0.0)
    if needed > there + UNNOTICEABLE:
        yield f"{needed:g} {name} are needed and it has {there:g}"
        return
    largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
    for share in shares:
        if (one := share.resources().get(name, 0.0)) > largest + UNNOTICEABLE:
            yield f"one of the {share.what} needs {one:g} {name} and no node has more than {largest:g}"


def say(text: str) -> None:
    """A line on stderr about the cluster, for who gave the command."""
    sys.stderr.write(f"ray: {text}\n")
    sys.stderr.flush()
