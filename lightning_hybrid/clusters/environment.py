"""What Lightning asks about the processes of a run that Ray started."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from typing_extensions import override


@dataclass(frozen=True)
class Place:
    """Where a rank is among the others.

    Attributes:
        world_size: ranks of the run.
        rank: of this process.
        local_world_size: ranks of its node.
        local_rank: its rank among those.
        node_rank: of its node.
    """

    world_size: int
    rank: int
    local_world_size: int
    local_rank: int
    node_rank: int


def place_in_ray() -> Place:
    """That of this worker of Ray Train."""
    import ray.train

    context = ray.train.get_context()
    return Place(
        context.get_world_size(),
        context.get_world_rank(),
        context.get_local_world_size(),
        context.get_local_rank(),
        context.get_node_rank(),
    )


class RayEnvironment(ClusterEnvironment):
    """Ranks are workers of Ray Train, each with the GPU that Ray gave it, which have met already.

    Args:
        place: of this rank.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    @override
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    @override
    def detect() -> bool:
        """False: it is handed to the Trainer, and never guessed."""
        return False

    @override
    def world_size(self) -> int:
        return self.place.world_size

    @override
    def set_world_size(self, size: int) -> None:
        """Nothing: Ray has decided."""

    @override
    def global_rank(self) -> int:
        return self.place.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        """Nothing: Ray has decided."""

    @override
    def local_rank(self) -> int:
        return self.place.local_rank

    @override
    def node_rank(self) -> int:
        return self.place.node_rank
