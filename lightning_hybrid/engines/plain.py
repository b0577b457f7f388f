"""A model that engines have left: modes and parameters as they were before, and whole where that is possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.engines.agreement import number_of_ranks

# What ZeRO-3 sets on modules, beside names that begin with ds_.
ON_MODULES = (
    "_external_params",
    "_original_parameters",
    "all_parameters",
    "applied_pre_backward_ref_cnt",
    "post_bwd_fn",
    "pre_bwd_fn",
)


class PlainModel:
    """Remember how a model is before engines are built, to take back what they leave on it.

    An interrupt may find a model in evaluation mode, because it generates. DeepSpeed hangs its optimizer on every
    parameter, which keeps its states in memory and cannot be copied to other processes; at ZeRO-3 a parameter is a
    shard that no other engine understands. On a single rank the shard is all there is, so that the parameter is made
    whole without a word to anybody: also after an interrupt in the middle of anything. With several ranks ZeRO-3 shards
    stay shards.

    Args:
        root: the model; parameters that are sharded by now are left alone.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modes = {module: module.training for module in root.modules()}
        self._before = {p: set(vars(p)) for p in root.parameters() if not hasattr(p, "ds_id")}

    def restore(self) -> None:
        """Take it back, after the engines were destroyed; safe to call again."""
        modes, self._modes = self._modes, {}
        for module, training in modes.items():
            module.training = training
        before, self._before = self._before, {}
        shared = number_of_ranks() > 1
        for parameter, names in before.items():
            if hasattr(parameter, "ds_id"):
                if shared:
                    continue
                _make_whole(parameter)
            for name in vars(parameter).keys() - names:
                delattr(parameter, name)
        if not shared:
            for module in self._root.modules():
                _make_plain(module)
            _forget_running_modules()


def _make_whole(parameter: Any) -> None:
    """Give a parameter the values of its only shard, from the disk where it was offloaded to one."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    shard = parameter.ds_tensor
    in_memory = shard.status == PartitionedParamStatus.AVAILABLE
    values = shard.data if in_memory else _read_from_disk(parameter)
    parameter.data = values.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
    parameter.grad = None  # of another shape


def _read_from_disk(parameter: Any) -> Tensor:
    """The shard's values, straight from DeepSpeed's file: its buffers and the way to fill them went with the engine."""
    swapper = parameter.nvme_swapper
    path = swapper.get_path(parameter, must_exist=True)
    return torch.from_file(path, size=parameter.ds_numel, dtype=swapper.dtype).clone()


def _make_plain(module: nn.Module) -> None:
    if not hasattr(module, "_original_parameters"):
        return
    if any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()):
        return  # sharded before engines were built
    module._parameters = dict(module._parameters)
    for name in [name for name in vars(module) if name in ON_MODULES or name.startswith("ds_")]:
        delattr(module, name)


def _forget_running_modules() -> None:
    """An exception inside a forward leaves the modules that were running on DeepSpeed's stack."""
    from deepspeed.runtime.zero import parameter_offload

    del parameter_offload.FWD_MODULE_STACK[:]
