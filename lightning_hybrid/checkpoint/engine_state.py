"""An engine's weights, optimizer state and counters, as a checkpoint holds them: by parameter, whatever the ZeRO stage.

What a rank writes are stretches of flattened parameters, named after the parameter. So a checkpoint does not depend on
the number of ranks, on the ZeRO stage, nor on the order in which the optimizer holds its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_hybrid.checkpoint.fragments import FlatTensor, Piece, flat_tensors, shape_of
from lightning_hybrid.checkpoint.tensors import Stretches
from lightning_hybrid.errors import CheckpointError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WEIGHT = "weight"
TENSOR = "tensor"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class EngineState:
    """This rank's share of an engine.

    Attributes:
        tensors: stretches of flattened parameters, one-dimensional, by ``"<parameter>:<what>"``.
        starts: where each begins in its parameter.
        buffers: the module's persistent ones, which may differ between ranks.
        summary: what is the same on all ranks, of plain types: parameters, groups, numbers, counters, loss scale.
    """

    tensors: dict[str, Tensor]
    starts: dict[str, int]
    buffers: dict[str, Tensor]
    summary: dict[str, Any]


def engine_state(engine: DeepSpeedEngine) -> EngineState:
    """What has to be kept of an engine; the tensors are views of its own, no copies."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for flat in flat_tensors(engine):
        for key, values in _elementwise(engine, flat).items():
            for piece in flat.pieces:
                name = f"{piece.name}:{key}"
                tensors[name] = values.detach().reshape(-1).narrow(0, piece.offset, piece.numel)
                starts[name] = piece.start
    return EngineState(tensors, starts, _buffers(engine), _summary(engine))


def restore_engine(
    engine: DeepSpeedEngine, stretches: Stretches, buffers: Mapping[str, Tensor], summary: dict[str, Any]
) -> None:
    """Put an engine into the state of a checkpoint.

    Raises:
        CheckpointError: if its trainable parameters are not those of the checkpoint; names those that differ.
    """
    _refuse_other_parameters(engine, summary)
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        for flat in flat_tensors(engine):
            _restore_flat(engine, flat, stretches, summary)
        _restore_buffers(engine, buffers)
    _restore_numbers(engine, summary)
    spread_weights(engine)


# ---- the parts ----------------------------------------------------------------------------------------------------


def _elementwise(engine: DeepSpeedEngine, flat: FlatTensor) -> dict[str, Tensor]:
    """The weights, and every state of theirs that has as many elements."""
    state = engine.basic_optimizer.state.get(flat.values, {})
    kept = {WEIGHT: flat.values}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() == flat.values.numel() and value.dim() > 0:
            kept[key] = value
        elif isinstance(value, Tensor) and value.numel() > 1:
            optimizer = type(engine.basic_optimizer).__name__
            raise CheckpointError(
                f"{optimizer} keeps {key!r} of shape {tuple(value.shape)}, which is no element-wise state"
            )
    return kept


def _buffers(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    trained = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    buffers = dict(engine.module.named_buffers())
    persistent = engine.module.state_dict(keep_vars=True).keys() - trained
    return {name: buffers[name].detach() for name in sorted(persistent & buffers.keys())}


def _summary(engine: DeepSpeedEngine) -> dict[str, Any]:
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {
        "stage": engine.zero_optimization_stage(),
        "parameters": {name: shape_of(p) for name, p in trained.items()},
        "groups": [_plain_group(group) for group in engine.basic_optimizer.param_groups],
        "numbers": dict(_numbers(engine)),
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
        "loss_scale": _loss_scale(engine),
    }


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of a parameter group."""
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in settings.items()}


def _numbers(engine: DeepSpeedEngine) -> Iterator[tuple[str, dict[str, Any]]]:
    """Single numbers in the optimizer's state, such as Adam's step, for each parameter that lies on this rank."""
    for flat in flat_tensors(engine):
        state = engine.basic_optimizer.state.get(flat.values, {})
        single = {key: _plain_number(value) for key, value in state.items() if _is_number(value)}
        for piece in flat.pieces:
            if single:
                yield piece.name, single


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


def _plain_number(value: Any) -> Any:
    """Torch's optimizers count in tensors, DeepSpeed's in integers; each gets back what it had."""
    return {TENSOR: value.item()} if isinstance(value, Tensor) else value


def _number(value: Any, device: torch.device | None) -> Any:
    return torch.tensor(value[TENSOR], dtype=torch.float32, device=device) if isinstance(value, dict) else value


def _loss_scale(engine: DeepSpeedEngine) -> dict[str, Any]:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    held = vars(scaler) if scaler is not None and engine.fp16_enabled() else {}
    return {key: value for key, value in held.items() if isinstance(value, int | float)}


def merged_numbers(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """One summary of all ranks': numbers of parameters that lie on some of them only."""
    numbers: dict[str, Any] = {}
    for summary in summaries:
        numbers |= summary["numbers"]
    return summaries[0] | {"numbers": numbers}


# ---- restoring ----------------------------------------------------------------------------------------------------


def _refuse_other_parameters(engine: DeepSpeedEngine, summary: dict[str, Any]) -> None:
    mine = {name: shape_of(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    theirs: dict[str, list[int]] = summary["parameters"]
    problems = [f"{name!r} is not in the checkpoint" for name in mine.keys() - theirs.keys()]
    problems += [f"{name!r} is in the checkpoint only" for name in theirs.keys() - mine.keys()]
    problems += [
        f"{name!r} has shape {mine[name]}, in the checkpoint {theirs[name]}"
        for name in mine.keys() & theirs.keys()
        if mine[name] != theirs[name]
    ]
    if len(summary["groups"]) != len(engine.basic_optimizer.param_groups):
        ours = len(engine.basic_optimizer.param_groups)
        problems.append(f"the optimizer has {ours} parameter groups, in the checkpoint {len(summary['groups'])}")
    if problems:
        listed = "; ".join(sorted(problems)[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(f"what is trained is not what the checkpoint holds: {listed}")


def _restore_flat(engine: DeepSpeedEngine, flat: FlatTensor, stretches: Stretches, summary: dict[str, Any]) -> None:
    names = [piece.name for piece in flat.pieces]
    for piece in flat.pieces:
        _fill(flat.values, piece, stretches, WEIGHT, engine)
    keys = {name.rsplit(":", 1)[1] for name in stretches.names() if name.rsplit(":", 1)[0] in names} - {WEIGHT}
    numbers = [summary["numbers"].get(name, {}) for name in names]
    if not keys and not any(numbers):
        engine.basic_optimizer.state.pop(flat.values, None)
        return
    state = {
        key: torch.zeros_like(flat.values, dtype=stretches.dtype(f"{names[0]}:{key}"), requires_grad=False)
        for key in sorted(keys)
    }
    for key, values in state.items():
        for piece in flat.pieces:
            _fill(values, piece, stretches, key, engine)
    _refuse_numbers_that_differ(names, numbers)
    group = engine.basic_optimizer.param_groups[flat.group]
    # Where a kernel reads the step, it reads it on the device.
    device = flat.values.device if group.get("fused") or group.get("capturable") else None
    single = {key: _number(value, device) for key, value in numbers[0].items()}
    engine.basic_optimizer.state[flat.values] = single | state


def _fill(values: Tensor, piece: Piece, stretches: Stretches, key: str, engine: DeepSpeedEngine) -> None:
    """Take a piece out of the checkpoint; at stage 0 the whole parameter, of which other ranks wrote parts."""
    flat = values.detach().view(-1)
    if engine.zero_optimization_stage() == 0:
        stretches.read_into(f"{piece.name}:{key}", 0, flat)
    else:
        stretches.read_into(f"{piece.name}:{key}", piece.start, flat.narrow(0, piece.offset, piece.numel))


def _refuse_numbers_that_differ(names: list[str], numbers: list[dict[str, Any]]) -> None:
    """One flat tensor has one step count; parameters of which some were stepped less often have no place in it."""
    for name, own in zip(names, numbers, strict=True):
        if own != numbers[0]:
            raise CheckpointError(
                f"{names[0]!r} was stepped {numbers[0]} and {name!r} {own}, and this ZeRO stage holds them in one "
                "tensor: go on at the stage that the checkpoint was written at"
            )


def _restore_buffers(engine: DeepSpeedEngine, buffers: Mapping[str, Tensor]) -> None:
    own = dict(engine.module.named_buffers())
    for name, value in buffers.items():
        if name in own:
            own[name].copy_(value)


def _restore_numbers(engine: DeepSpeedEngine, summary: dict[str, Any]) -> None:
    for group, saved in zip(engine.basic_optimizer.param_groups, summary["groups"], strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value
    for name, value in summary["counters"].items():
        setattr(engine, name, value)
    for name, value in summary["loss_scale"].items():
        if hasattr(engine.optimizer, "loss_scaler"):
            setattr(engine.optimizer.loss_scaler, name, value)


def spread_weights(engine: DeepSpeedEngine) -> None:
    """From the optimizer's full-precision weights to those that the model computes with, on every rank."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for flat, computed in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            computed.data.copy_(flat.data)
        for index in range(len(optimizer.fp16_partitioned_groups_flat)):
            _point_shards_at(optimizer, index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()


def _point_shards_at(optimizer: Any, index: int) -> None:
    """As DeepSpeed does after its own loading: every shard is a view of its group's flat tensor."""
    views = optimizer.unflatten(optimizer.fp16_partitioned_groups_flat[index], optimizer.fp16_partitioned_groups[index])
    for shard, view in zip(optimizer.fp16_partitioned_groups[index], views, strict=True):
        shard.data = view.data
