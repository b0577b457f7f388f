"""Several hosts: whether processes were started as the Trainer expects, and the network by which they meet."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import TYPE_CHECKING

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lightning_hybrid.errors import StrategyError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


def refuse_other_launch(environment: ClusterEnvironment, processes: int, nodes: int) -> None:
    """Check the Trainer's number of processes against what torchrun, srun or the environment say.

    Args:
        environment: by which Lightning knows who starts the processes.
        processes: on each host, as the Trainer has it.
        nodes: hosts, as the Trainer has it.

    Raises:
        StrategyError: where they differ, or Lightning is to start the processes of several hosts and was not told how.
    """
    if isinstance(environment, TorchElasticEnvironment):
        total = int(os.environ["WORLD_SIZE"])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        _compare("torchrun", total, here, processes, nodes)
    elif isinstance(environment, SLURMEnvironment):
        total = int(os.environ["SLURM_NTASKS"])
        here = int(os.environ.get("SLURM_NTASKS_PER_NODE", total // int(os.environ.get("SLURM_NNODES", 1))))
        _compare("srun", total, here, processes, nodes)
    elif type(environment) is LightningEnvironment:
        _refuse_unknown_place(environment.node_rank(), nodes)


_REMEDIES = {
    "torchrun": "start torchrun with --nnodes {nodes} --nproc-per-node {processes}",
    "srun": "have --nodes={nodes} --ntasks-per-node={processes} in the job script",
}


def _compare(launcher: str, total: int, here: int, processes: int, nodes: int) -> None:
    if (total, here) == (processes * nodes, processes):
        return
    started = f"{launcher} starts {total} process{'' if total == 1 else 'es'}, {here} on each host"
    expected = f"the Trainer expects {processes * nodes}: trainer.devices={processes} × trainer.num_nodes={nodes}"
    there = _REMEDIES[launcher].format(nodes=nodes, processes=processes)
    raise StrategyError(
        f"{started}, but {expected}: set trainer.devices={here} trainer.num_nodes={total // here}, or {there}"
    )


def _refuse_unknown_place(node_rank: int, nodes: int) -> None:
    needed = {"NODE_RANK": "GROUP_RANK", "MASTER_ADDR": "MASTER_ADDR", "MASTER_PORT": "MASTER_PORT"}
    missing = [name for name, other in needed.items() if name not in os.environ and other not in os.environ]
    if nodes > 1 and missing:
        raise StrategyError(
            f"trainer.num_nodes={nodes}, but {', '.join(missing)} not set: start the same command once on each host "
            f"with NODE_RANK=0 to {nodes - 1}, and on all of them MASTER_ADDR (an address of the first that the others "
            "reach) and MASTER_PORT (a free port there); or start it by torchrun or srun"
        )
    if node_rank >= nodes:
        raise StrategyError(
            f"NODE_RANK={node_rank}, but trainer.num_nodes={nodes}, and hosts are numbered from 0: set "
            "trainer.num_nodes to the number of hosts, or unset NODE_RANK (or GROUP_RANK) on a single one"
        )


def interface_to_others(main_address: str) -> str | None:
    """The network interface that gloo is to use, as GLOO_SOCKET_IFNAME names it; None where it chooses well itself.

    By itself gloo tells other ranks the address that this host's name stands for. On many machines that is a loopback
    address, by which no other host can be reached; the interface towards the first host is right then.

    Args:
        main_address: name or address of the host that has rank 0.

    Raises:
        StrategyError: where neither the name nor the route tells, and there are several interfaces, or none.
    """
    if not _is_loopback(socket.gethostname()):
        return None
    interfaces = _interfaces()
    source = _source_towards(main_address)
    found = [name for name, addresses in interfaces.items() if source in addresses]
    if not found and len(interfaces) == 1:  # on the first host itself, whose own name leads nowhere else
        found = list(interfaces)
    if not found:
        raise StrategyError(
            f"gloo would tell other hosts to reach this one, '{socket.gethostname()}', by a loopback address: export "
            f"GLOO_SOCKET_IFNAME=<the interface towards them> here; there are: {', '.join(interfaces) or 'none'}"
        )
    return found[0]


def _is_loopback(name: str) -> bool:
    """Whether a host's name stands for a loopback address, or for none, which gloo takes alike."""
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return True
    return ipaddress.ip_address(str(address).split("%")[0]).is_loopback


def _source_towards(address: str) -> str:
    """This host's address on the way to another one; "" if there is no way. Nothing is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _interfaces() -> dict[str, list[str]]:
    """Interfaces that are up and lead out of this host, with their addresses."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    addresses = {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
    }
    return {
        name: found
        for name, found in addresses.items()
        if name in up and any(not ipaddress.ip_address(one.split("%")[0]).is_loopback for one in found)
    }
