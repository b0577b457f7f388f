"""Settings that may make a run smaller: those that leave the result as it is, and those that do not and say so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_hybrid.algorithms import GroupConfig
from lightning_hybrid.plan.phases import Plan
from lightning_hybrid.plan.verdicts import beside, largest, setting
from lightning_hybrid.plan.vllm import VLLMEngine
from lightning_hybrid.plan.weights import TRAINED

# Fewer responses to compare with each other are none; fewer texts tell little, but something.
LEAST_GROUP = 2
TEXTS_OF_CLASSIFIER = 8


@dataclass(frozen=True)
class Change:
    """One or several settings.

    Attributes:
        values: by their keys in the configuration.
        overrides: the same as the command line takes them.
        costs: what of the result they change; empty where that stays the same.
    """

    values: tuple[tuple[str, Any], ...]
    overrides: tuple[str, ...]
    costs: tuple[str, ...] = ()

    def __add__(self, other: Change) -> Change:
        """Both; where both set a key, the later one counts."""
        overrides = dict(override.split("=", 1) for override in (*self.overrides, *other.overrides))
        values = dict(self.values) | dict(other.values)
        costs = tuple(dict.fromkeys((*self.costs, *other.costs)))
        return Change(tuple(values.items()), tuple(f"{key}={value}" for key, value in overrides.items()), costs)


def changes(plan: Plan) -> Iterator[Change]:
    """All that are worth a try."""
    yield from _of_memory(plan)
    yield from _of_roles(plan)
    yield from _of_strategy(plan)
    yield from _of_the_result(plan)


def _set(key: str, value: Any, costs: str | None = None) -> Change:
    written = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return Change(((key, value),), (f"{key.removesuffix('.name')}={written}",), () if costs is None else (costs,))


def _of_memory(plan: Plan) -> Iterator[Change]:
    run = plan.setup.run
    for name, awake in run.strategy.sleep.model_dump().items():
        if not awake:
            yield _set(f"strategy.sleep.{name}", True)
    if run.algorithm.micro_batch_size > 1:
        yield _set("algorithm.micro_batch_size", max(1, plan.setup.micro_batch // 2))
    if run.algorithm.logprob_chunk > 64:
        yield _set("algorithm.logprob_chunk", run.algorithm.logprob_chunk // 4)
    if plan.engine is not None:
        yield from _of_vllm(plan, plan.engine)
    elif plan.cache.slots > 1:
        yield _set("rollout.max_tokens_in_flight", plan.cache.slots // 2 * plan.cache.capacity)
    terms = {f"reward.terms.{name}": term for name, term in run.reward.terms.items()}
    for key, term in {"reward": run.reward, **terms}.items():
        if term.classifier is not None and term.classifier.batch_size > TEXTS_OF_CLASSIFIER:
            yield _set(f"{key}.classifier.batch_size", TEXTS_OF_CLASSIFIER)


def _of_vllm(plan: Plan, engine: VLLMEngine) -> Iterator[Change]:
    """Sleep, a cache that fits, and a model that more devices share."""
    config = engine.config
    if config.colocate and not config.enable_sleep and not engine.on_cpu:
        yield _set("rollout.vllm.enable_sleep", True)
    fitting = largest(plan)
    if fitting is not None and beside(plan) + engine.awake > engine.device:
        yield _set(setting(engine), fitting)
    size = 2 * config.tensor_parallel_size
    if plan.setup.ranks % size == 0 and config.num_engines is None:
        yield _set("rollout.vllm.tensor_parallel_size", size)


def _of_roles(plan: Plan) -> Iterator[Change]:
    """Layers computed twice, and frozen models shared between ranks while the others are not."""
    setup = plan.setup
    trained = [setup.networks[name] for name in TRAINED if name in setup.networks]
    keeping = [network.name for network in trained if not network.settings.gradient_checkpointing]
    if keeping:  # at once: models of one size take turns at being the largest
        yield sum((_set(f"roles.{name}.gradient_checkpointing", True) for name in keeping), Change((), ()))
    frozen = {network.role for network in setup.networks.values() if network.name not in TRAINED}
    for role in sorted(frozen):
        if setup.ranks > 1 and setup.engines[role].stage < 3:
            yield _set(f"roles.{role}.zero_stage", 3)


def _of_strategy(plan: Plan) -> Iterator[Change]:
    setup, engine = plan.setup, plan.setup.run.strategy.hybrid_engine
    general = setup.general
    if not setup.run.strategy.config.get("zero_optimization", {}).keys() & {"stage", "offload_optimizer"}:
        for stage in range(general.stage + 1, 4):
            yield _set("strategy.name", f"hybrid_deepspeed_stage_{stage}")
        if not general.offloads_optimizer and not setup.on_cpu and general.stage > 0:
            yield _set("strategy.name", f"hybrid_deepspeed_stage_{max(2, general.stage)}_offload")
    if not engine.release_inference_cache:
        yield _set("strategy.hybrid_engine.release_inference_cache", True)
    if general.stage > 0 and general.bucket > 50_000_000:
        yield _set("strategy.config.zero_optimization.reduce_bucket_size", 50_000_000)
    if setup.stage == 3:
        yield from _of_generation(plan)


def _of_generation(plan: Plan) -> Iterator[Change]:
    """With the actor's weights shared between ranks."""
    engine = plan.setup.run.strategy.hybrid_engine
    if engine.pin_parameters and engine.inference_tp_size == 1:
        yield _set("strategy.hybrid_engine.pin_parameters", False)
    if engine.tp_gather_partition_size > 1 and engine.inference_tp_size > 1:
        yield _set("strategy.hybrid_engine.tp_gather_partition_size", 1)
    for size in (2, 4, 8):
        if size > engine.inference_tp_size:
            yield _set("strategy.hybrid_engine.inference_tp_size", size)


def _of_the_result(plan: Plan) -> Iterator[Change]:
    run, networks = plan.setup.run, plan.setup.networks
    if run.model.adapter is None:
        costs = "trains an adapter in place of the policy's weights"
        yield Change((("model.adapter", {}),), ("adapter=lora",), (costs,))
    if "critic" in networks and run.model.critic_adapter is None:
        costs = "trains an adapter and the head in place of the critic's weights"
        yield Change((("model.critic_adapter", {}),), ("adapter@model.critic_adapter=lora",), (costs,))
    algorithm = run.algorithm
    if isinstance(algorithm, GroupConfig) and algorithm.group_size // 2 >= LEAST_GROUP:
        half = algorithm.group_size // 2
        yield _set("algorithm.group_size", half, f"compares {half} responses to a prompt, not {algorithm.group_size}")
    if algorithm.reference and algorithm.kl_coef == 0 and run.model.reference is None:
        yield _set("algorithm.reference", False, "the KL is no longer logged")
    if algorithm.ptx_coef > 0 and run.ptx.batch_size > 1:
        half = run.ptx.batch_size // 2
        yield _set("ptx.batch_size", half, f"a step reads {half} texts of the PTX loss, not {run.ptx.batch_size}")
    if run.callbacks.ema_decay is not None:
        yield _set("callbacks.ema_decay", None, "no average of the weights is written")
