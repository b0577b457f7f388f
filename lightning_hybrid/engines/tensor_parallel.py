"""Groups of consecutive ranks that share one copy of the model during generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lightning_hybrid.containers import Shard
from lightning_hybrid.errors import StrategyError
from lightning_hybrid.generation import SamplingParams


def tensor_parallel_shard(size: int) -> Shard:
    """This rank's share in its group of ``size`` consecutive ranks. All ranks call it, in the same order.

    Raises:
        StrategyError: if the ranks do not divide into groups of this size.
    """
    world = torch.distributed.get_world_size()
    if world % size:
        raise StrategyError(
            f"hybrid_engine.inference_tp_size={size} does not divide the {world} ranks: use a divisor of {world}"
        )
    groups = [torch.distributed.new_group(list(range(begin, begin + size))) for begin in range(0, world, size)]
    rank = torch.distributed.get_rank()
    return Shard(rank % size, size, groups[rank // size])


class GroupPrompts(NamedTuple):
    """The prompts of all ranks of a group.

    Attributes:
        prompts: of the ranks, one rank's after the other's.
        indices: of the prompts, in their random streams' names.
        begin: the first prompt of this rank.
        end: one past its last.
    """

    prompts: list[list[int]]
    indices: list[int]
    begin: int
    end: int


def gather_prompts(
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int] | None,
    seed: int,
    sampling: SamplingParams,
    shard: Shard,
) -> GroupPrompts:
    """Collect the prompts of a group; without a group, this rank's own.

    Raises:
        StrategyError: if the ranks' seeds or sampling differ, so that they would draw different tokens for a row; if
            there is not one index for each prompt.
    """
    given = None if indices is None else list(indices)
    own = ([list(prompt) for prompt in prompts], given, (seed, sampling))
    held: list[Any] = [own]
    if shard.size > 1:
        held = [None] * shard.size
        torch.distributed.all_gather_object(held, own, group=shard.group)
    ways = {way for _, _, way in held}
    if len(ways) > 1:
        said = "; ".join(f"seed {seed}, {sampling}" for seed, sampling in sorted(ways, key=str))
        raise StrategyError(f"ranks that share a model must draw in one way, these have: {said}")
    together = [prompt for theirs, _, _ in held for prompt in theirs]
    begin = sum(len(theirs) for theirs, _, _ in held[: shard.rank])
    if all(theirs is None for _, theirs, _ in held):
        names = list(range(len(together)))
    else:
        names = [index for _, theirs, _ in held for index in theirs or ()]
    if len(names) != len(together):
        raise StrategyError(f"{len(together)} prompts came with {len(names)} indices: give one for each, on every rank")
    return GroupPrompts(together, names, begin, begin + len(prompts))
