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
from lightning_hybrid.plan.setup import Setup, device_bytes
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
    """

    setup: Setup
    device: int
    cache: Cache
    moments: dict[str, tuple[Moment, ...]]

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
        """Whether every phase fits the device."""
        return self.peak <= self.device


def make_plan(run: PlanRun) -> Plan:
    """Plan a run, in the state that it has once optimizers have taken their first step.

    Raises:
        ConfigError: for a model whose configuration cannot be read or whose key-value heads do not divide by
            ``inference_tp_size``, or a device that is not here.
    """
    setup = Setup(run)
    device = device_bytes(setup)
    generate = at_rest(setup, GENERATE, {"actor"})
    extra = Held("actor", "weights", extra_weight_bytes(setup, setup.networks["actor"]))
    cache = cache_of(setup, device - moment("", generate, [extra]).bytes())
    kept = [Held("actor", "KV cache", cache.bytes), *tokens_seen(setup, cache)]
    generate = [*generate, extra, *kept]
    given_up = run.strategy.sleep.kv_cache or run.strategy.hybrid_engine.release_inference_cache
    moments = {
        GENERATE: (
            moment("reading prompts", generate, last_rollout(setup), reading_prompts(setup, cache)),
            moment("drawing tokens", generate, rollout(setup), drawing_tokens(setup, cache)),
        ),
        SCORE: tuple(scoring(setup, kept, experience(setup))),
        TRAIN: tuple(training(setup, ([] if given_up else kept) + experience(setup))),
    }
    return Plan(setup, device, cache, moments)
