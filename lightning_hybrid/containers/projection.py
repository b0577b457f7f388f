"""A layer's matrix products over the trained tensors: one for several projections where these are adjacent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hybrid.containers.weights import Cut, Shard, Weights

# CPU libraries deal rows out in fours and multiply what is left over along another path, which rounds otherwise: a
# response would depend, in its last bits, on how many others are generated beside it. Of many rows none are left over.
ROWS, MANY_ROWS = 4, 256


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter (Hu et al. 2022): ``scale · up · down · x`` is added to what the base returns.

    Attributes:
        down: ``[rank, in]``.
        up: ``[out, rank]``.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` (rsLoRA).
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Part:
    """Some output rows of a linear layer.

    Attributes:
        weight: ``[out, in]``, a view.
        bias: ``[out]``, a view, or None.
        adapters: what is added to it.
    """

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()


def trained(module: Any) -> Any:
    """The module that peft trains in place of the original (``modules_to_save``), or the module itself."""
    copies = getattr(module, "modules_to_save", None)
    if not copies or module.disable_adapters:
        return getattr(module, "original_module", module)
    return copies[module.active_adapters[0]]


def part_of(
    module: nn.Module,
    weights: Weights,
    unit: int,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Part:
    """The tensors of a linear layer (or of GPT-2's transposed one), with peft's adapters around it if there are any.

    Args:
        module: the layer, or peft's around it.
        weights: where its values are.
        unit: which the layer belongs to.
        rows: of the outputs, first and one past the last; None for all.
        columns: of the inputs; the bias is then left whole.
    """
    module = trained(module)
    base: Any = getattr(module, "base_layer", module)
    transposed = type(base).__name__ == "Conv1D"
    weight = weights.of(base.weight, unit, _cut(rows, columns, transposed))
    bias = getattr(base, "bias", None)
    return Part(
        weight.t() if transposed else weight,
        None if bias is None else weights.of(bias, unit, _cut(rows, None)),
        _adapters(module, weights, unit, rows, columns),
    )


def _cut(rows: tuple[int, int] | None, columns: tuple[int, int] | None, transposed: bool = False) -> Cut | None:
    if rows is not None:
        return Cut(int(transposed), *rows)
    return None if columns is None else Cut(int(not transposed), *columns)


def _adapters(
    module: Any, weights: Weights, unit: int, rows: tuple[int, int] | None, columns: tuple[int, int] | None
) -> tuple[Adapter, ...]:
    if not hasattr(module, "base_layer") or module.disable_adapters or module.merged:
        return ()
    return tuple(
        Adapter(
            weights.of(module.lora_A[name].weight, unit, _cut(None, columns)),
            weights.of(module.lora_B[name].weight, unit, _cut(rows, None)),
            float(module.scaling[name]),
        )
        for name in module.active_adapters
        if name in module.lora_A
    )


class Projection:
    """``x → x Wᵀ + b`` for one or several parts at once.

    Parts that lie side by side in memory are one product; where they do not, each is a product of its own. Nothing is
    ever copied to make them so. Adapters are products of their own too, as in training: added into weights of 16 bits,
    small ones would vanish.

    Args:
        parts: in the order of their outputs.
        shard: add up the products of the group's ranks, each of which holds some input columns.
    """

    def __init__(self, parts: Sequence[Part], shard: Shard | None = None) -> None:
        self.parts = list(parts)
        self.shard = shard or Shard()
        self.weight = adjacent([part.weight for part in self.parts])
        biases = [part.bias for part in self.parts if part.bias is not None]
        self.bias = adjacent(biases) if len(biases) == len(self.parts) else None
        # One product and one addition where both are whole, else a product for each part.
        self.whole = self.weight is not None and (self.bias is not None or not biases)
        ends = torch.tensor([len(part.weight) for part in self.parts]).cumsum(0).tolist()
        self.adapters = [
            (slice(end - len(part.weight), end), adapter)
            for part, end in zip(self.parts, ends, strict=True)
            for adapter in part.adapters
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, in]`` → ``[rows, out]``."""
        rows = len(x)
        if rows % ROWS == 0 or rows > MANY_ROWS:
            return self._product(x)
        return self._product(F.pad(x, (0, 0, 0, -rows % ROWS)))[:rows]

    def _product(self, x: Tensor) -> Tensor:
        if self.shard.size > 1:
            return self._summed(x)
        if self.whole:
            out = F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        else:
            out = torch.cat([F.linear(x, part.weight, part.bias) for part in self.parts], -1)
        return self._adapted(out, x)

    def _summed(self, x: Tensor) -> Tensor:
        (part,) = self.parts
        out = self.shard.sum(self._adapted(F.linear(x, part.weight), x))
        return out if part.bias is None else out + part.bias

    def _adapted(self, out: Tensor, x: Tensor) -> Tensor:
        for rows, adapter in self.adapters:
            added = F.linear(F.linear(x.to(adapter.down.dtype), adapter.down), adapter.up) * adapter.scale
            out[..., rows] += added.to(out.dtype)
        return out


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view over tensors that follow each other in memory along their first dimension; None if they do not."""
    first, rows, end = tensors[0], 0, tensors[0].data_ptr()
    for tensor in tensors:
        same = tensor.stride() == first.stride() and tensor.shape[1:] == first.shape[1:] and tensor.dtype == first.dtype
        if not same or tensor.data_ptr() != end or not _same_storage(tensor, first):
            return None
        rows += len(tensor)
        end += len(tensor) * tensor.stride(0) * tensor.element_size()
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
