"""Whole weights out of ZeRO-3 shards, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` is held in ZeRO-3 shards."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


@contextmanager
def gathered(module: nn.Module, writable: bool = False) -> Iterator[None]:
    """Hold every parameter of ``module`` whole on every rank inside the block; a no-op where nothing is sharded.

    Args:
        module: whose parameters to gather.
        writable: keep what rank 0 writes into them; otherwise writes are lost when the parameters are given back.
    """
    if not is_sharded(module):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0 if writable else None):
        yield


@contextmanager
def hooks_lifted(engine: DeepSpeedEngine) -> Iterator[None]:
    """Take ZeRO-3's fetch and release hooks off the engine's module inside the block.

    With the hooks on, every forward shards the weights again, also inside ``GatheredParameters``, and ranks that stop
    at different lengths wait for each other's collectives for ever.
    """
    from deepspeed.runtime.zero import parameter_offload

    offload = engine.optimizer.parameter_offload
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    for parameter in engine.module.parameters():
        parameter.ds_active_sub_modules.clear()
    try:
        yield
    finally:
        # A block that raised inside a hook may leave modules on the stack, which only ever holds roots between calls.
        del parameter_offload.FWD_MODULE_STACK[:]
        offload.setup_zero_stage3_hooks()
