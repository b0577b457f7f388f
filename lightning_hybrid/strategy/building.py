"""From a LightningModule to engines: one for each optimizer, and one for each frozen child."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hybrid.engines import EngineOptimizer, build_engine, build_evaluation_engine
from lightning_hybrid.strategy.ownership import EngineSpec, Owner

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ConfigOf = Callable[[EngineSpec | None], dict[str, Any]]


def specs_of(root: nn.Module) -> dict[str, EngineSpec]:
    """What a module asks of its children's engines; frozen children stop requiring gradients."""
    configure = getattr(root, "configure_engines", None)
    specs: dict[str, EngineSpec] = dict(configure()) if configure is not None else {}
    for name, spec in specs.items():
        if spec.kind == "frozen":
            root.get_submodule(name).requires_grad_(False).eval()
    return specs


def build_frozen(
    root: nn.Module, specs: Mapping[str, EngineSpec], config_of: ConfigOf, device: torch.device, *, fitting: bool
) -> dict[str, nn.Module]:
    """Evaluation engines, by name: of frozen children in training, of all that the module names otherwise."""
    names = [name for name, spec in specs.items() if spec.kind == "frozen" or not fitting]
    if not fitting and not specs:
        names = [""]
    frozen = {}
    for name in names:
        config = config_of(specs.get(name))
        config.pop("hybrid_engine", None)
        frozen[name] = build_evaluation_engine(root.get_submodule(name), config, device)
    return frozen


def build_trained(
    owners: Sequence[Owner], config_of: ConfigOf, device: torch.device
) -> tuple[dict[str, DeepSpeedEngine], list[EngineOptimizer]]:
    """An engine for each optimizer, by name, and what Lightning holds in the optimizer's place."""
    engines, optimizers = {}, []
    for owner in owners:
        params = [list(group["params"]) for group in owner.optimizer.param_groups]
        hybrid = owner.spec.kind == "hybrid"
        engine = build_engine(owner.module, owner.optimizer, config_of(owner.spec), hybrid=hybrid, device=device)
        engines[owner.name] = engine
        optimizers.append(EngineOptimizer(engine, params))
    return engines, optimizers
