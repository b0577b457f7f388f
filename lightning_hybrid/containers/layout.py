"""Puts projections that are multiplied together next to each other in memory, once, before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hybrid.containers.families import FAMILIES
from lightning_hybrid.containers.layer import find
from lightning_hybrid.containers.projection import trained
from lightning_hybrid.models import base_of


def fused_sets(model: Any) -> Iterator[list[nn.Parameter]]:
    """Parameters that a container would like adjacent: ``[q; k; v]`` and ``[gate; up]``, weights and biases."""
    base = base_of(model)
    family = FAMILIES.get(getattr(getattr(base, "config", None), "model_type", ""))
    if family is None:
        return
    for layer in find(find(base, family.trunk), family.layers):
        attention = find(layer, family.attention)
        for modules in (
            [find(attention, name) for name in family.qkv],
            [find(layer, name) for name in family.mlp_in],
        ):
            bases = [getattr(trained(module), "base_layer", module) for module in modules]
            for name in ("weight", "bias"):
                parameters = [getattr(base, name, None) for base in bases]
                whole = [parameter for parameter in parameters if parameter is not None]
                if len(whole) == len(bases) > 1:
                    yield whole


def units(model: Any) -> list[list[nn.Parameter]]:
    """All parameters a container reads, unit by unit as in :class:`~lightning_hybrid.containers.weights.Weights`.

    Within a unit, sets that would be adjacent follow each other.
    """
    base = base_of(model)
    family = FAMILIES[base.config.model_type]
    trunk = find(base, family.trunk)
    layers = find(trunk, family.layers)
    ends = (family.final_norm, family.project_out)
    first = [family.embedding, family.position_embedding, family.embedding_norm, family.project_in]
    last = [find(trunk, name) for name in ends] + [base.get_output_embeddings()]
    sets = list(fused_sets(model))
    return [
        _parameters([find(trunk, name) for name in first]),
        *(_parameters([layer], sets) for layer in layers),
        _parameters(last),
    ]


def _parameters(modules: list[Any], sets: list[list[nn.Parameter]] | None = None) -> list[nn.Parameter]:
    """Parameters of modules, each once, those of a set where its first one is."""
    own = {id(p): p for module in modules if module is not None for p in module.parameters()}
    return _together(list(own.values()), sets or [])


def _together(parameters: list[nn.Parameter], sets: list[list[nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters with those of a set where its first one is; a set that is not all here is left as it is."""
    held = {id(parameter) for parameter in parameters}
    follows = {id(whole[0]): whole for whole in sets if all(id(parameter) in held for parameter in whole)}
    later = {id(parameter) for whole in follows.values() for parameter in whole[1:]}
    return [q for p in parameters if id(p) not in later for q in follows.get(id(p), [p])]


def order_parameters(optimizer: Optimizer, model: Any) -> None:
    """Order an optimizer's parameters so that sets stay adjacent when DeepSpeed flattens each group in its order.

    A set of which parts are in different groups, or not trained, is left as it is.
    """
    sets = list(fused_sets(model))
    for group in optimizer.param_groups:
        group["params"] = _together(group["params"], sets)


@torch.no_grad()
def lay_out(model: Any) -> None:
    """Move the parameters of each set into one block, values unchanged.

    For weights that DeepSpeed does not flatten: those of ZeRO stage 0, and bases of LoRA adapters. Left alone are sets
    that lie so already, and parameters that are views into memory of somebody else's.
    """
    for parameters in fused_sets(model):
        if len({parameter.dtype for parameter in parameters}) > 1 or not all(map(_owns_its_memory, parameters)):
            continue
        block = torch.cat([parameter.data for parameter in parameters])
        pieces = block.split([len(parameter) for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece


def _owns_its_memory(parameter: nn.Parameter) -> bool:
    size = parameter.numel() * parameter.element_size()
    return size > 0 and not hasattr(parameter, "ds_id") and parameter.untyped_storage().nbytes() == size
