"""From a LightningModule to engines: one for each optimizer, and one for each frozen child."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hybrid.engines import EngineOptimizer, build_engine, build_evaluation_engine, engine_config
from lightning_hybrid.engines.config import merged
from lightning_hybrid.errors import StrategyError
from lightning_hybrid.strategy.ownership import EngineSpec, Owner

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from deepspeed import DeepSpeedEngine

ConfigOf = Callable[[EngineSpec | None], dict[str, Any]]


@dataclass(frozen=True)
class EngineSettings:
    """What a strategy's engines have in common.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        offload_optimizer: whether optimizer states are in host memory.
        offload_parameters: whether parameters are.
        hybrid_engine: DeepSpeed's section of that name, for engines that generate.
        overrides: DeepSpeed keys merged over all others, but for an engine's own.
    """

    stage: int
    offload_optimizer: bool
    offload_parameters: bool
    hybrid_engine: dict[str, Any]
    overrides: dict[str, Any]

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise StrategyError(f"ZeRO stage must be 0, 1, 2 or 3; got {self.stage!r}")

    def config(self, spec: EngineSpec, precision: str, trainer: pl.Trainer | None) -> dict[str, Any]:
        """The DeepSpeed config of an engine.

        Args:
            spec: what its module asks for.
            precision: a Lightning precision, such as ``"bf16-mixed"``.
            trainer: says how to clip; without one, nothing is clipped.

        Raises:
            StrategyError: for clipping by value.
        """
        return engine_config(
            stage=self.stage,
            precision=precision,
            gradient_clipping=_clipping(trainer),
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
            hybrid_engine=self.hybrid_engine if spec.kind == "hybrid" else None,
            overrides=merged(self.overrides, dict(spec.config)),
        )


def _clipping(trainer: pl.Trainer | None) -> float:
    """The gradient norm to clip to; 0 for none."""
    if trainer is None or not trainer.gradient_clip_val:
        return 0.0
    if trainer.gradient_clip_algorithm == "value":
        raise StrategyError("DeepSpeed clips by norm only: leave gradient_clip_algorithm out")
    return float(trainer.gradient_clip_val)


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


def end_engines(engines: Iterable[Any]) -> None:
    """Let go of what engines hold; modules that have none are left alone."""
    for engine in engines:
        if hasattr(engine, "destroy"):
            engine.module_forward_pre_hook.remove()
            engine.module_forward_post_hook.remove()
            engine.destroy()
