"""Where the ranks of one start of a job meet: the store of torchrun's agent remembers the starts before."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import default_pg_timeout

from lightning_hybrid.errors import RankLostError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

POLL_SECONDS = 0.05


def store_of_this_start(environment: ClusterEnvironment, timeout: timedelta | None) -> Store | None:
    """A corner of the agent's store that no earlier start has written to; None where torch makes a store for each.

    When torchrun restarts the ranks (``--max-restarts``), its agents keep their store, and with it the addresses of
    ranks that are dead. A rank that is early would read one, and never meet the others. The number of the restart,
    which torchrun tells, differs between the hosts.

    Args:
        environment: by which Lightning knows who starts the processes.
        timeout: for ranks to come; torch's own by default.

    Raises:
        RankLostError: on rank 0, if some do not come.
    """
    if not isinstance(environment, TorchElasticEnvironment) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    patience = timeout or default_pg_timeout
    store = TCPStore(environment.main_address, environment.main_port, is_master=False, timeout=patience)
    place = PrefixStore("lightning_hybrid/starts", store)
    rank, world_size = environment.global_rank(), environment.world_size()
    name = _tell_name(place, world_size, patience.total_seconds()) if rank == 0 else _ask_name(place, rank)
    return PrefixStore(f"lightning_hybrid/{name}", store)


def _ask_name(store: Store, rank: int) -> str:
    """The name of this start, by an answer to a question that was never asked before."""
    question = uuid.uuid4().hex
    store.set(f"questions/{rank}", question)
    name = store.get(f"answers/{question}").decode()
    store.set(f"{name}/{rank}", "heard")
    return name


def _tell_name(store: Store, world_size: int, patience: float) -> str:
    """Answer whatever is asked, also what dead ranks have asked, until every rank has heard the name."""
    name, missing = uuid.uuid4().hex, list(range(1, world_size))
    deadline = time.monotonic() + patience
    while missing:
        for rank in missing:
            if store.check([f"questions/{rank}"]):
                store.set(f"answers/{store.get(f'questions/{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"{name}/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise RankLostError(f"ranks {missing} did not come to meet the others within {patience:.0f} s")
        time.sleep(POLL_SECONDS if missing else 0.0)
    return name
