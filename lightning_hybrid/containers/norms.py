"""Normalisation as the trained layers do it, in their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hybrid.containers.projection import trained
from lightning_hybrid.containers.weights import Weights

Norm = Callable[[Tensor], Tensor]


def norm_of(module: nn.Module | None, weights: Weights, unit: int, unit_offset: bool = False) -> Norm:
    """The inference view of a norm; without a module, a norm that leaves its input alone."""
    if module is None:
        return _leave
    module = trained(module)
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(module, weights, unit)
    return OffsetRMSNorm(module, weights, unit) if unit_offset else RMSNorm(module, weights, unit)


def _leave(x: Tensor) -> Tensor:
    return x


class LayerNorm:
    """Layer normalisation (Ba et al. 2016) over the last dimension."""

    def __init__(self, module: nn.LayerNorm, weights: Weights, unit: int) -> None:
        self.eps = module.eps
        self.weight = None if module.weight is None else weights.of(module.weight, unit)
        self.bias = None if module.bias is None else weights.of(module.bias, unit)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., width]`` → the same shape and dtype."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class RMSNorm:
    """Root-mean-square normalisation (Zhang and Sennrich 2019) in float32, weighted in the input's dtype."""

    def __init__(self, module: Any, weights: Weights, unit: int) -> None:
        self.eps = float(getattr(module, "variance_epsilon", None) or module.eps)
        self.weight = weights.of(module.weight, unit)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., width]`` → the same shape and dtype."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)


class OffsetRMSNorm(RMSNorm):
    """RMS normalisation whose weight counts from 1, applied in float32 (Gemma)."""

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., width]`` → the same shape and dtype."""
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)
