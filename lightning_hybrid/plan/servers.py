"""Models in processes of their own: vLLM engines, a frozen reference, reward models, each on a device of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_hybrid.plan.held import Held, Moment, moment
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.passes import pass_of
from lightning_hybrid.plan.setup import Setup
from lightning_hybrid.plan.vllm import NAME, VLLMEngine


@dataclass(frozen=True)
class Server:
    """A process beside the ranks.

    Attributes:
        name: of what runs in it.
        devices: that it has, which all hold as much; 0 for the host's memory.
        moments: of one device, or the host.
    """

    name: str
    devices: int
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """When the device holds most."""
        return max(self.moments, key=Moment.bytes)

    def too_much(self, device: int) -> int:
        """Bytes that one of its devices lacks, if each has ``device``; the host's memory is not judged."""
        return max(0, self.peak.bytes() - device) if self.devices else 0


def servers_of(setup: Setup, engine: VLLMEngine | None) -> tuple[Server, ...]:
    """All that a run has.

    Args:
        setup: of the run.
        engine: of vLLM, where that generates.
    """
    roles: dict[str, list[Network]] = {}
    for network in setup.separate.values():
        roles.setdefault(network.role, []).append(network)
    engines = _engines(engine) if engine is not None and not engine.config.colocate else []
    return (*engines, *(_of_role(setup, role, networks) for role, networks in roles.items()))


def _engines(engine: VLLMEngine) -> list[Server]:
    """They go on with what they were drawing once they have new weights: the cache stays."""
    config, held = engine.config, engine.held()
    bucket = Held(NAME, "buffers", min(config.bucket_mib * 2**20, engine.weights))
    moments = (
        moment("generates", held),
        moment("takes weights", [part for part in held if part.kind in ("weights", "KV cache")], [bucket]),
    )
    return [Server(f"{NAME} engine {i}", config.tensor_parallel_size, moments) for i in range(config.processes)]


def _of_role(setup: Setup, role: str, networks: list[Network]) -> Server:
    device = getattr(setup.run.roles, role).device
    return Server(role, 0 if device is None else 1, tuple(_passes(setup, networks)))


def _passes(setup: Setup, networks: list[Network]) -> Iterator[Moment]:
    """Whole models, without an engine; one of them runs at a time."""
    weights = [Held(network.name, "weights", network.numel * network.itemsize) for network in networks]
    for network in networks:
        yield moment(f"{network.name}'s forward pass", weights, pass_of(setup, network))
