"""What the plan says about vLLM engines, in words: what they hold, whether there is room, and which setting has it."""

from __future__ import annotations

import math

from lightning_hybrid.plan.held import gib
from lightning_hybrid.plan.phases import Plan
from lightning_hybrid.plan.vllm import GIB, NAME, VLLMEngine

SHARE, CACHE = "rollout.vllm.gpu_memory_utilization", "rollout.vllm.kv_cache_gib"
_DIGITS = 100  # of a share, and of GiB, one in so many


def of_engine(plan: Plan) -> list[str]:
    """A line with figures, and one for each thing that is wrong."""
    engine = plan.engine
    if engine is None:
        return []
    lines = [_holds(plan, engine)]
    if not _has_room(plan, engine):
        lines.append(_no_room(plan, engine))
    if engine.rows < 1:
        lines.append(_no_row(plan, engine))
    elif engine.rows < min(engine.asked, engine.at_once):
        lines.append(f"Of {engine.asked} rows that are asked for at a time, {engine.rows} are generated at once.")
    return lines


def _has_room(plan: Plan, engine: VLLMEngine) -> bool:
    return beside(plan) + engine.awake <= engine.device


def beside(plan: Plan) -> int:
    """Bytes that stay awake beside the engine while it generates; nothing where it has a device of its own."""
    engine = plan.engine
    if engine is None or not engine.config.colocate:
        return 0
    return max(moment.bytes() - moment.bytes(owner=NAME) for moment in plan.moments["generate"])


def largest(plan: Plan) -> float | None:
    """The largest value of the engine's setting that fits beside what stays awake; None where none does."""
    engine = plan.engine
    assert engine is not None
    free = engine.device - beside(plan)
    if free < engine.without_cache + engine.row:
        return None
    return _down(free / engine.device if engine.by_share else (free - engine.without_cache) / GIB)


def least(engine: VLLMEngine) -> float:
    """The smallest value of its setting with which the cache holds one row of the longest kind."""
    return _up((engine.without_cache + engine.row) / engine.device if engine.by_share else engine.row / GIB)


def setting(engine: VLLMEngine) -> str:
    """The key of what decides how large the cache is."""
    return SHARE if engine.by_share else CACHE


def _down(value: float) -> float:
    return math.floor(value * _DIGITS) / _DIGITS


def _up(value: float) -> float:
    return math.ceil(value * _DIGITS) / _DIGITS


def _holds(plan: Plan, engine: VLLMEngine) -> str:
    share = engine.config.gpu_memory_utilization
    of = f" of {share:g} × {gib(engine.device)} GiB" if engine.by_share else ""
    return (
        f"{NAME}: {gib(engine.awake)} GiB awake{of}: weights {gib(engine.weights)}, a pass "
        f"{gib(engine.activations + engine.logits)}, KV cache {gib(engine.cache)}, which holds {_rows(engine.rows)} of "
        f"{plan.setup.tokens} tokens; {_asleep(engine)}."
    )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _asleep(engine: VLLMEngine) -> str:
    if not engine.config.colocate:
        return "it does not sleep, on devices of its own"
    if not engine.sleeps:
        return "it does not sleep on a CPU" if engine.on_cpu else "it never sleeps (rollout.vllm.enable_sleep=false)"
    return "asleep its weights are in host memory" if engine.config.sleep_level == 1 else "asleep it holds nothing"


def _no_room(plan: Plan, engine: VLLMEngine) -> str:
    kept, value = beside(plan), largest(plan)
    now = (
        engine.config.gpu_memory_utilization if engine.by_share else (engine.config.kv_cache_gib or engine.cache / GIB)
    )
    beside_what = f" beside the {gib(kept)} GiB that stay awake while it generates" if kept else ""
    remedy = "no value has room for its weights and one row" if value is None else f"at most {value:g} fits"
    return f"{setting(engine)}={now:g} cannot fit{beside_what}: {remedy}."


def _no_row(plan: Plan, engine: VLLMEngine) -> str:
    needed, most = least(engine), largest(plan)
    remedy = f"{setting(engine)} of {needed:g} or more has room for one"
    if most is None or needed > (1.0 if engine.by_share else math.inf):
        remedy = (
            "no value has room for one: let more sleep, or share the model between more devices "
            "(rollout.vllm.tensor_parallel_size)"
        )
    return f"The KV cache is smaller than one row of {plan.setup.tokens} tokens ({gib(engine.row)} GiB): {remedy}."
