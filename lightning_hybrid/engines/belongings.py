"""What an engine holds on its device: weights, gradients, master weights, optimizer states, generation's workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lightning_hybrid.engines.sleep import Content


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass(frozen=True, eq=False)
class Belonging:
    """Some tensors of an engine that sleep and wake together.

    Attributes:
        engine: name of the engine, which is its child's in the module.
        kind: what they are: ``weights``, ``gradients``, ``master_weights``, ``optimizer`` or ``kv_cache``.
        setting: field of :class:`~lightning_hybrid.config.SleepConfig` that lets them sleep.
        tensors: the tensors as of now.
        content: of their storages after waking; None for tensors that do not come back.
        ready: whether they may sleep now.
        moved: drops what holds on to their addresses, or to the tensors themselves.
    """

    engine: str
    kind: str
    setting: str
    tensors: Callable[[], list[Tensor]]
    content: Content | None = "values"
    ready: Callable[[], bool] = _always
    moved: Callable[[], None] = _nothing

    @property
    def owner(self) -> str:
        """Engine and kind, such as ``actor/weights``."""
        return f"{self.engine or 'module'}/{self.kind}"


def frozen_belongings(name: str, model: nn.Module) -> list[Belonging]:
    """What a model without an optimizer holds, an evaluation engine or the module itself."""
    parameters = list(model.parameters())
    return [Belonging(name, "weights", "frozen_models", lambda: weights(parameters))]


def trained_belongings(name: str, engine: Any) -> list[Belonging]:
    """What an engine with an optimizer holds."""
    # Walking through the modules takes longer than all else: phases ask often.
    parameters = list(engine.module.parameters())

    def drop_workspace() -> None:
        engine._workspace = None

    def is_ready() -> bool:
        return not gradients_pending(engine, parameters)

    generates = hasattr(engine, "_workspace")
    # Captured steps hold raw addresses of weights.
    follow = drop_workspace if generates else _nothing
    held = [
        Belonging(name, "weights", "weights", lambda: weights(parameters), moved=follow),
        Belonging(name, "gradients", "gradients", lambda: gradients(engine, parameters), "zeros", is_ready),
        Belonging(name, "gradients", "gradients", lambda: gradient_buckets(engine), "anything", is_ready),
        Belonging(name, "master_weights", "master_weights", lambda: master_weights(engine)),
        Belonging(name, "optimizer", "optimizer", lambda: optimizer_states(engine)),
    ]
    if generates:
        held.append(Belonging(name, "kv_cache", "kv_cache", lambda: workspace(engine), None, moved=drop_workspace))
    return held


def weights(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Parameters, and at ZeRO-3 their shards."""
    found: list[Tensor] = list(parameters)
    for parameter in parameters:
        for name in ("ds_tensor", "ds_secondary_tensor"):
            shard = getattr(parameter, name, None)
            if shard is not None:
                found.append(shard)
    return found


def gradients(engine: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients that wait for a step, and flat buffers that DeepSpeed keeps for them between steps."""
    optimizer = engine.optimizer
    found = [parameter.grad for parameter in parameters]
    found += _held(optimizer, "averaged_gradients")
    found += _held(optimizer, "fp32_groups_gradients_flat")  # of BF16_Optimizer
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))  # of ZeRO-3
    return [gradient for gradient in found if gradient is not None]


def gradient_buckets(engine: Any) -> list[Tensor]:
    """Buffers in which gradients are collected during a backward pass; ZeRO-3 keeps them after it."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
    held = [getattr(bucket, "buffer", None) for bucket in buckets]
    return [buffer for buffer in held if isinstance(buffer, Tensor)]


def gradients_pending(engine: Any, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether gradients wait for a step, or are where they are of no weight: in host memory."""
    optimizer = engine.optimizer
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        return True
    counted = _held(optimizer, "averaged_gradients") + _held(optimizer, "all_grad_tensors")
    if counted or any(chain.from_iterable(getattr(optimizer, "fp32_groups_has_gradients", ()))):
        return True
    return any(p.grad is not None or getattr(p, "grad_accum", None) is not None for p in parameters)


def master_weights(engine: Any) -> list[Tensor]:
    """Copies of the weights that the optimizer steps on; at stage 0 it steps on the weights themselves."""
    names = (
        "single_partition_of_fp32_groups",  # ZeRO-1 and -2
        "fp32_groups_flat_partition",  # BF16_Optimizer
        "fp32_partitioned_groups_flat",  # ZeRO-3
    )
    return [tensor for name in names for tensor in _held(engine.optimizer, name)]


def optimizer_states(engine: Any) -> list[Tensor]:
    """States with an element for each weight; step counts stay where they are."""
    states = engine.basic_optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]


def workspace(engine: Any) -> list[Tensor]:
    """The KV cache and what else generation keeps from call to call."""
    kept = engine._workspace
    return [] if kept is None else [t for t in (kept.cache.data, kept._seen) if t is not None]


def _held(optimizer: Any, name: str) -> list[Tensor]:
    """The tensors in an attribute that is a list of tensors, or has a list of them for each group."""
    value = getattr(optimizer, name, None)
    return [] if not value else list(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
