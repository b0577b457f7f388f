"""Weights out of ZeRO-3 shards as inference containers want them: all at once, a layer at a time, or sliced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.containers import Cut, units
from lightning_hybrid.errors import RolloutError


class Gathered:
    """All weights at once, in one buffer per dtype, laid out so that containers find sets adjacent.

    Args:
        model: the causal LM, its parameters sharded.
        device: where the buffer goes.

    Attributes:
        bytes: held beyond the shards.
    """

    lasting, steady = False, True

    def __init__(self, model: Any, device: torch.device) -> None:
        order = list({id(p): p for unit in units(model) for p in unit}.values())
        self._block = _Block(order, device)
        self.bytes = self._block.bytes
        self._block.gather(order)

    def of(self, parameter: nn.Parameter, unit: int, cut: Cut | None = None) -> Tensor:
        """A view into the buffer."""
        whole = self._block.view(parameter)
        return whole if cut is None else cut.of(whole)

    def fetch(self, unit: int) -> None:
        """Nothing to do: everything is there."""


class LayerByLayer:
    """One unit's weights at a time, each in the same buffer, gathered when its turn comes.

    Args:
        model: the causal LM, its parameters sharded.
        device: where the buffer goes.

    Attributes:
        bytes: held beyond the shards.
    """

    lasting, steady = False, False

    def __init__(self, model: Any, device: torch.device) -> None:
        self._units = units(model)
        largest: dict[torch.dtype, Tensor] = {}
        self._blocks = [_Block(unit, device, largest) for unit in self._units]
        self.bytes = sum(buffer.nbytes for buffer in largest.values())

    def of(self, parameter: nn.Parameter, unit: int, cut: Cut | None = None) -> Tensor:
        """A view into the buffer, right only until another unit is fetched."""
        whole = self._blocks[unit].view(parameter)
        return whole if cut is None else cut.of(whole)

    def fetch(self, unit: int) -> None:
        """Gather a unit. All ranks do so in the same order."""
        self._blocks[unit].gather(self._units[unit])


class Sliced:
    """This rank's cuts only, filled a few layers at a time: no rank ever holds the whole model.

    Args:
        model: the causal LM, its parameters sharded.
        device: where the cuts go.
        together: layers gathered at a time (DeepSpeed's ``tp_gather_partition_size``).

    Attributes:
        bytes: held beyond the shards, the gathering at its height included.
    """

    lasting, steady = False, True

    def __init__(self, model: Any, device: torch.device, together: int) -> None:
        self._units = units(model)
        self._device, self._together = device, together
        self._cuts: dict[tuple[int, Cut | None], Tensor] = {}
        self.bytes = 0

    def of(self, parameter: nn.Parameter, unit: int, cut: Cut | None = None) -> Tensor:
        """Memory for the cut; its values come with :meth:`fill`."""
        key = (id(parameter), cut)
        if key not in self._cuts:
            shape = list(_shape(parameter))
            if cut is not None:
                shape[cut.dim] = cut.end - cut.begin
            self._cuts[key] = torch.empty(shape, dtype=parameter.dtype, device=self._device)
        return self._cuts[key]

    def fetch(self, unit: int) -> None:
        """Nothing to do: everything is there."""

    def fill(self) -> None:
        """Gather a few layers, keep the cuts, and go on with the next."""
        held = sum(cut.nbytes for cut in self._cuts.values())
        for begin in range(0, len(self._units), self._together):
            some = [p for unit in self._units[begin : begin + self._together] for p in unit]
            block = _Block(some, self._device)
            block.gather(some)
            self.bytes = max(self.bytes, held + block.bytes)
            self._keep(block, {id(p): p for p in some})

    def _keep(self, block: _Block, gathered: dict[int, nn.Parameter]) -> None:
        for (key, cut), kept in self._cuts.items():
            if key in gathered:
                whole = block.view(gathered[key])
                kept.copy_(whole if cut is None else cut.of(whole))


class _Block:
    """Parameters laid end to end in one buffer per dtype.

    Args:
        parameters: in their order.
        device: of the buffers.
        shared: buffers to share with other blocks, replaced by larger ones where these are too small.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], device: torch.device, shared: dict[torch.dtype, Tensor] | None = None
    ) -> None:
        self._places: dict[int, int] = {}
        ends: dict[torch.dtype, int] = {}
        for parameter in _sharded(parameters):
            begin = ends.get(parameter.dtype, 0)
            self._places[id(parameter)] = begin
            ends[parameter.dtype] = begin + parameter.ds_numel  # type: ignore[attr-defined]
        self.buffers = {} if shared is None else shared
        for dtype, end in ends.items():
            # What the last shard is padded with lands behind the end.
            size = end + _ranks(parameters) - 1
            if dtype not in self.buffers or len(self.buffers[dtype]) < size:
                self.buffers[dtype] = torch.empty(size, dtype=dtype, device=device)
        self.bytes = sum(buffer.nbytes for buffer in self.buffers.values())

    def view(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter; one that is not sharded is itself."""
        if id(parameter) not in self._places:
            return parameter.detach()
        begin = self._places[id(parameter)]
        shape = _shape(parameter)
        return self.buffers[parameter.dtype][begin : begin + shape.numel()].view(shape)

    def gather(self, parameters: Sequence[nn.Parameter]) -> None:
        """Collect the shards of all ranks, one parameter after another.

        Shards are padded to equal lengths: what one parameter's padding overwrites, the next one's values write anew,
        so that parameters end up adjacent.
        """
        for parameter in _sharded(parameters):
            shard = _available(parameter).to(self.buffers[parameter.dtype].device)
            group = parameter.ds_process_group  # type: ignore[attr-defined]
            begin, size = self._places[id(parameter)], shard.numel() * torch.distributed.get_world_size(group)
            target = self.buffers[parameter.dtype][begin : begin + size]
            torch.distributed.all_gather_into_tensor(target, shard, group=group)


def _sharded(parameters: Sequence[nn.Parameter]) -> Iterator[nn.Parameter]:
    return (parameter for parameter in parameters if hasattr(parameter, "ds_id"))


def _ranks(parameters: Sequence[nn.Parameter]) -> int:
    groups = (parameter.ds_process_group for parameter in _sharded(parameters))  # type: ignore[attr-defined]
    return max(torch.distributed.get_world_size(group) for group in groups)


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _available(parameter: Any) -> Tensor:
    """This rank's shard.

    Raises:
        RolloutError: if it was offloaded to a disk.
    """
    shard: Tensor = parameter.ds_tensor
    if shard.numel() == 0 and parameter.ds_numel > 0:
        raise RolloutError(
            "parameters are offloaded to NVMe, from where inference containers do not read: "
            "offload them to the CPU, or set rollout.backend=hf"
        )
    return shard
