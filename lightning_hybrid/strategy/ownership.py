"""Which module becomes which engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from lightning_hybrid.errors import StrategyError


@dataclass(frozen=True)
class EngineSpec:
    """What a module asks of the engine of one of its children; returned by ``configure_engines``.

    Attributes:
        kind: ``"train"`` for a plain engine, ``"hybrid"`` for one that also generates, ``"frozen"`` for a child
            without an optimizer that is only evaluated.
        config: DeepSpeed keys merged over the strategy's for this engine alone.
    """

    kind: Literal["train", "hybrid", "frozen"] = "train"
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Owner:
    """A module that becomes an engine.

    Attributes:
        name: dotted path inside the LightningModule, ``""`` for the LightningModule itself.
        module: the module.
        optimizer: the optimizer over its trainable parameters.
        spec: what it asked for.
    """

    name: str
    module: nn.Module
    optimizer: Optimizer
    spec: EngineSpec


def assign_owners(root: nn.Module, optimizers: Sequence[Optimizer], specs: Mapping[str, EngineSpec]) -> list[Owner]:
    """Give each optimizer the largest module that holds all of its parameters and nobody else's.

    That is a child of ``root`` as a rule, a deeper module where several optimizers share one child, and ``root`` itself
    where a single optimizer spans several children.

    Raises:
        StrategyError: if optimizers share a parameter or cannot be separated, a trainable parameter has no optimizer,
            or a spec names a child that is not there; all problems in one report.
    """
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    problems = [*_unknown_children(root, specs), *_shared_parameters(optimizers, names)]
    frozen = (
        {id(p) for name in _frozen(specs) for p in root.get_submodule(name).parameters()} if not problems else set()
    )
    problems += _parameters_without_optimizer(root, optimizers, frozen)
    if problems:
        raise StrategyError("the module cannot be split into engines:\n" + "\n".join(f"  - {p}" for p in problems))
    return [_owner(root, index, optimizers, specs, frozen) for index in range(len(optimizers))]


def _owner(
    root: nn.Module, index: int, optimizers: Sequence[Optimizer], specs: Mapping[str, EngineSpec], frozen: set[int]
) -> Owner:
    mine = _parameter_ids(optimizers[index])
    others = frozen.union(*(_parameter_ids(o) for i, o in enumerate(optimizers) if i != index))
    for name, module in _from_large_to_small(root):
        held = {id(parameter) for parameter in module.parameters()}
        if mine <= held and not held & others:
            return Owner(name, module, optimizers[index], specs.get(name, EngineSpec()))
    children = sorted({name.split(".")[0] for name, p in root.named_parameters() if id(p) in mine})
    raise StrategyError(
        f"optimizer {index} ({type(optimizers[index]).__name__}) has parameters in {children}, and no module holds "
        "them without holding another optimizer's or a frozen model's: put what one optimizer trains into one nn.Module"
    )


def _from_large_to_small(root: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Children before their own children, and ``root`` last, whose forward is ``training_step``."""
    level = [(name, child) for name, child in root.named_children()]
    while level:
        yield from level
        level = [(f"{name}.{inner}", child) for name, module in level for inner, child in module.named_children()]
    yield "", root


def _parameter_ids(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _frozen(specs: Mapping[str, EngineSpec]) -> list[str]:
    return [name for name, spec in specs.items() if spec.kind == "frozen"]


def _unknown_children(root: nn.Module, specs: Mapping[str, EngineSpec]) -> list[str]:
    known = {name for name, _ in root.named_modules()}
    children = sorted(name for name, _ in root.named_children())
    return [
        f"configure_engines names {name!r}, which is no submodule; there are: {children}"
        for name in specs
        if name not in known
    ]


def _shared_parameters(optimizers: Sequence[Optimizer], names: Mapping[int, str]) -> list[str]:
    first: dict[int, int] = {}
    shared: dict[tuple[int, int], list[str]] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter in _parameter_ids(optimizer):
            owner = first.setdefault(parameter, index)
            if owner != index:
                shared.setdefault((owner, index), []).append(names.get(parameter, "?"))
    return [
        f"optimizers {a} and {b} share {_listed(found)}: a parameter is trained by one optimizer only"
        for (a, b), found in shared.items()
    ]


def _parameters_without_optimizer(root: nn.Module, optimizers: Sequence[Optimizer], frozen: set[int]) -> list[str]:
    trained = frozen.union(*(_parameter_ids(optimizer) for optimizer in optimizers))
    left = [name for name, p in root.named_parameters() if p.requires_grad and id(p) not in trained]
    if not left:
        return []
    return [
        f"{_listed(left)} require gradients but belong to no optimizer: give them to one in configure_optimizers, "
        "call requires_grad_(False) on them, or name their module as frozen in configure_engines"
    ]


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
