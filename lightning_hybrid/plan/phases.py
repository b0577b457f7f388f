"""The plan: the phases of an iteration, each at the moment when it holds most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.plan.experience import experience, last_rollout, rollout
from lightning_hybrid.plan.generation import (
    Cache,
    cache_of,
    drawing_tokens,
    extra_weight_bytes,
    reading_prompts,
    tokens_seen,
)
from lightning_hybrid.plan.held import HOST, Held, Moment, moment
from lightning_hybrid.plan.passes import scoring, training
from lightning_hybrid.plan.servers import Server, servers_of
from lightning_hybrid.plan.setup import Setup, device_bytes
from lightning_hybrid.plan.vllm import VLLMEngine, cache_of_engine, engine_of, generating
from lightning_hybrid.plan.weights import GENERATE, SCORE, TRAIN, at_rest

PHASES = (GENERATE, SCORE, TRAIN)


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        setup: of the run.
        device: bytes of one device.
        cache: of generation.
        moments: of each phase, in order.
        engine: of vLLM, where that generates.
        servers: processes beside the ranks.
    """

    setup: Setup
    device: int
    cache: Cache
    moments: dict[str, tuple[Moment, ...]]
    engine: VLLMEngine | None = None
    servers: tuple[Server, ...] = ()

    @cached_property
    def peaks(self) -> dict[str, Moment]:
        """Of each phase, when the device holds most."""
        return {phase: max(moments, key=Moment.bytes) for phase, moments in self.moments.items()}

    @property
    def peak(self) -> int:
        """Bytes of the device in the phase that takes most."""
        return max(moment.bytes() for moment in self.peaks.values())

    @property
    def host(self) -> int:
        """Bytes that one rank holds in the host's memory, beside what its process takes.

        The sum of all that is ever there: memory for what sleeps stays allocated while it is awake. On a GPU it is
        pinned, and torch's allocator of pinned memory may round each piece up, to as much as the next power of two.
        """
        every = [moment for moments in self.moments.values() for moment in moments]
        kinds = {(held.owner, held.kind) for moment in every for held in moment.held if held.where == HOST}
        return sum(max(moment.bytes(owner=o, kind=k, where=HOST) for moment in every) for o, k in kinds)

    @property
    def fits(self) -> bool:
        """Whether every phase fits the device, and every server its own; and vLLM has room for a row."""
        room = self.engine is None or self.engine.rows > 0
        return room and self.peak <= self.device and not any(server.too_much(self.device) for server in self.servers)


def make_plan(run: PlanRun) -> Plan:
    """Plan a run, in the state that it has once optimizers have taken their first step.

    Raises:
        ConfigError: for a model whose configuration cannot be read or whose key-value heads do not divide by
            ``inference_tp_size``, a device that is not here, or engines of vLLM that do not come out even.
    """
    setup = Setup(run)
    device = device_bytes(setup)
    engine = engine_of(setup, device) if run.rollout.backend == "vllm" else None
    cache, generate, kept = _inside(setup, device) if engine is None else _by_vllm(setup, engine)
    given_up = run.strategy.sleep.kv_cache or run.strategy.hybrid_engine.release_inference_cache
    outside = engine.held_outside() if engine is not None and engine.config.colocate else []
    tokens = experience(setup) + outside
    moments = {
        GENERATE: generate,
        SCORE: tuple(scoring(setup, kept, tokens)),
        TRAIN: tuple(training(setup, ([] if given_up else kept) + tokens)),
    }
    return Plan(setup, device, cache, moments, engine, servers_of(setup, engine))


def _inside(setup: Setup, device: int) -> tuple[Cache, tuple[Moment, ...], list[Held]]:
    """Generation in the ranks: its cache, its moments, and what it leaves behind unless that sleeps."""
    generate = at_rest(setup, GENERATE, {"actor"})
    extra = Held("actor", "weights", extra_weight_bytes(setup, setup.networks["actor"]))
    cache = cache_of(setup, device - moment("", generate, [extra]).bytes())
    kept = [Held("actor", "KV cache", cache.bytes), *tokens_seen(setup, cache)]
    generate = [*generate, extra, *kept]
    moments = (
        moment("reading prompts", generate, last_rollout(setup), reading_prompts(setup, cache)),
        moment("drawing tokens", generate, rollout(setup), drawing_tokens(setup, cache)),
    )
    return cache, moments, kept


def _by_vllm(setup: Setup, engine: VLLMEngine) -> tuple[Cache, tuple[Moment, ...], list[Held]]:
    """As :func:`_inside`; what an engine keeps is not a matter of ``strategy.sleep``."""
    return cache_of_engine(setup, engine), generating(setup, engine), []
