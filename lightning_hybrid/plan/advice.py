"""Which settings make a run smaller, each judged by planning the run again with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_hybrid.config import validate
from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.errors import LightningHybridError
from lightning_hybrid.plan.phases import Plan, make_plan

Change = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Advice:
    """A change of settings.

    Attributes:
        overrides: as the command line takes them.
        saved: bytes that the worst phase takes less.
        plan: of the run with the change.
    """

    overrides: tuple[str, ...]
    saved: int
    plan: Plan


def advise(plan: Plan) -> list[Advice]:
    """Changes that save something, the largest first; last, where no single one is enough, several together."""
    found = [result for change in _changes(plan) if (result := _tried(plan, change)) is not None]
    singles = sorted((advice for _, advice in found), key=lambda advice: -advice.saved)
    if plan.fits or any(advice.plan.fits for advice in singles):
        return singles
    together = _together(plan)
    return singles if together is None else [*singles, together]


def _together(plan: Plan) -> Advice | None:
    """Take, again and again, the change that saves most, until it fits or nothing saves anything."""
    current = plan
    taken: Change = ()
    while not current.fits:
        tried = [result for change in _changes(current) if (result := _tried(current, change)) is not None]
        if not tried:
            break
        change, advice = max(tried, key=lambda result: result[1].saved)
        current, taken = advice.plan, _merged(taken, change)
    return None if len(taken) < 2 else Advice(_overrides(taken), plan.peak - current.peak, current)


def _merged(taken: Change, change: Change) -> Change:
    return tuple((dict(taken) | dict(change)).items())


def _tried(plan: Plan, change: Change) -> tuple[Change, Advice] | None:
    """The plan with a change; None where it is not allowed or saves nothing worth saying."""
    values = plan.setup.run.model_dump()
    for key, value in change:
        *groups, name = key.split(".")
        group = values
        for part in groups:
            group = group.setdefault(part, {})
        group[name] = value
    try:
        changed = make_plan(validate(PlanRun, values))
    except LightningHybridError:
        return None
    saved = plan.peak - changed.peak
    return (change, Advice(_overrides(change), saved, changed)) if saved > plan.device / 1000 else None


def _overrides(change: Change) -> tuple[str, ...]:
    return tuple(f"{key.removesuffix('.name')}={_written(value)}" for key, value in change)


def _written(value: Any) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changes(plan: Plan) -> Iterator[Change]:
    run = plan.setup.run
    for name, awake in run.strategy.sleep.model_dump().items():
        if not awake:
            yield ((f"strategy.sleep.{name}", True),)
    yield from _of_strategy(plan)
    if run.algorithm.micro_batch_size > 1:
        yield (("algorithm.micro_batch_size", max(1, plan.setup.micro_batch // 2)),)
    if run.algorithm.logprob_chunk > 64:
        yield (("algorithm.logprob_chunk", run.algorithm.logprob_chunk // 4),)
    if plan.cache.slots > 1:
        yield (("rollout.max_tokens_in_flight", plan.cache.slots // 2 * plan.cache.capacity),)
    if plan.setup.stage > 0 and plan.setup.bucket > 50_000_000:
        yield (("strategy.config.zero_optimization.reduce_bucket_size", 50_000_000),)


def _of_strategy(plan: Plan) -> Iterator[Change]:
    setup, engine = plan.setup, plan.setup.run.strategy.hybrid_engine
    if not setup.run.strategy.config.get("zero_optimization", {}).keys() & {"stage", "offload_optimizer"}:
        for stage in range(setup.stage + 1, 4):
            yield (("strategy.name", f"hybrid_deepspeed_stage_{stage}"),)
        if not setup.offloads_optimizer and not setup.on_cpu and setup.stage > 0:
            yield (("strategy.name", f"hybrid_deepspeed_stage_{max(2, setup.stage)}_offload"),)
    if not engine.release_inference_cache:
        yield (("strategy.hybrid_engine.release_inference_cache", True),)
    if setup.stage < 3:
        return
    if engine.pin_parameters and engine.inference_tp_size == 1:
        yield (("strategy.hybrid_engine.pin_parameters", False),)
    if engine.tp_gather_partition_size > 1 and engine.inference_tp_size > 1:
        yield (("strategy.hybrid_engine.tp_gather_partition_size", 1),)
    for size in (2, 4, 8):
        if size > engine.inference_tp_size:
            yield (("strategy.hybrid_engine.inference_tp_size", size),)
