"""Which part of which parameter this rank's optimizer holds, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened parameter inside a tensor that the optimizer steps.

    Attributes:
        name: of the parameter, in the engine's module.
        start: of the stretch in the flattened parameter.
        offset: of the stretch in the flat tensor.
        numel: elements of the stretch.
    """

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class FlatTensor:
    """A tensor that the torch optimizer inside an engine steps, and the parameters that lie in it.

    Attributes:
        values: full-precision weights; what the optimizer's state is keyed by.
        group: index of its parameter group.
        pieces: this rank's.
    """

    values: Tensor
    group: int
    pieces: list[Piece]


def flat_tensors(engine: DeepSpeedEngine) -> list[FlatTensor]:
    """All tensors that the engine's optimizer steps on this rank.

    At stage 0, where every rank holds everything, each rank answers for an equal share of every parameter.
    """
    names = {id(p): name for name, p in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(_of_stage_3(engine, names))
    return list(_of_stages_1_and_2(engine, names) if stage else _of_stage_0(engine, names))


def _of_stage_0(engine: DeepSpeedEngine, names: dict[int, str]) -> Iterator[FlatTensor]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        for parameter in group["params"]:
            begin, end = (parameter.numel() * r // ranks for r in (rank, rank + 1))
            pieces = [Piece(names[id(parameter)], begin, begin, end - begin)] if end > begin else []
            yield FlatTensor(parameter, index, pieces)


def _of_stages_1_and_2(engine: DeepSpeedEngine, names: dict[int, str]) -> Iterator[FlatTensor]:
    optimizer = engine.optimizer
    of_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")  # BF16_Optimizer has names of its own
    flats = optimizer.fp32_groups_flat_partition if of_bf16 else optimizer.single_partition_of_fp32_groups
    groups = optimizer.bf16_groups if of_bf16 else optimizer.bit16_groups
    for index, (flat, parameters) in enumerate(zip(flats, groups, strict=True)):
        pieces = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                pieces.append(Piece(names[id(parameter)], start, offset, mapping.lp_fragment_address.numel))
        yield FlatTensor(flat, index, pieces)


def _of_stage_3(engine: DeepSpeedEngine, names: dict[int, str]) -> Iterator[FlatTensor]:
    optimizer, rank = engine.optimizer, torch.distributed.get_rank()
    for index, (flat, parameters) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    ):
        pieces = []
        for parameter in parameters:
            _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, numel = own_share(parameter, rank)
            if numel > 0:
                pieces.append(Piece(names[id(parameter)], start, offset, numel))
        yield FlatTensor(flat, optimizer.sub_group_to_group_id[index], pieces)


def own_share(parameter: Any, rank: int) -> tuple[int, int]:
    """Start and number of the elements of a ZeRO-3 parameter that ``rank`` holds, padding left out."""
    size = parameter.partition_numel()
    start = size * rank
    return start, max(0, min(size, parameter.ds_numel - start))


def shape_of(parameter: Any) -> list[int]:
    """A parameter's whole shape, also where it is sharded."""
    return list(getattr(parameter, "ds_shape", parameter.shape))
