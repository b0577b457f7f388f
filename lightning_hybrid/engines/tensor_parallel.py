"""Groups of consecutive ranks that share one copy of the model during generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_hybrid.containers import Shard
from lightning_hybrid.errors import StrategyError


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
    prompts: Sequence[Sequence[int]], indices: Sequence[int] | None, seed: int, shard: Shard
) -> GroupPrompts:
    """Collect the prompts of a group; without a group, this rank's own.

    Raises:
        StrategyError: if the ranks' seeds differ, so that they would draw different tokens for the same row.
    """
    if shard.size == 1:
        own = list(range(len(prompts))) if indices is None else list(indices)
        return GroupPrompts([list(prompt) for prompt in prompts], own, 0, len(prompts))
    held: list[tuple[list[list[int]], list[int] | None, int]] = [([], None, 0)] * shard.size
    own_indices = None if indices is None else list(indices)
    torch.distributed.all_gather_object(
        held, ([list(prompt) for prompt in prompts], own_indices, seed), group=shard.group
    )
    seeds = {seed for _, _, seed in held}
    if len(seeds) > 1:
        raise StrategyError(f"ranks that share a model must draw with one seed, these have {sorted(seeds)}")
    together = [prompt for theirs, _, _ in held for prompt in theirs]
    begin = sum(len(theirs) for theirs, _, _ in held[: shard.rank])
    known = [index for theirs, given, _ in held for index in given or ()]
    return GroupPrompts(
        together, known if len(known) == len(together) else list(range(len(together))), begin, begin + len(prompts)
    )
