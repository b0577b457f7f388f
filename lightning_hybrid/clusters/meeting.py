"""How ranks meet: by a process group of our making, at an address that Ray finds out."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed

from lightning_hybrid.clusters.environment import Place
from lightning_hybrid.strategy.hosts import interface_to_others


def config_of_meeting() -> Any:
    """A ``TorchConfig`` that tells ranks where to meet, and leaves the rest to :func:`meet`.

    Ray's own would make the process group before anything of ours runs: without the interface that gloo needs on many
    hosts, and at the end of a lost worker it would wait for the others to leave it. The classes are made here so that
    Ray sends them as they are: its controller need not find this package.
    """
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Address(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            def find() -> tuple[str, int]:
                import socket

                import ray.util

                util: Any = ray.util
                host = util.get_node_ip_address()
                with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                    probe.bind((host, 0))
                    return host, probe.getsockname()[1]

            def keep(host: str, port: int) -> None:
                import os

                os.environ.update({"MASTER_ADDR": host, "MASTER_PORT": str(port)})

            host, port = worker_group.execute_single(0, find)
            worker_group.execute(keep, host=host, port=port)

    class Meeting(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Address

    return Meeting()


def meet(place: Place, timeout: timedelta, *, on_gpus: bool) -> None:
    """Make the process group of all ranks."""
    os.environ.update(
        {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
            "NODE_RANK": str(place.node_rank),
        }
    )
    on_several_hosts = place.local_world_size < place.world_size
    if on_several_hosts and not on_gpus and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_to_others(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=timeout)
