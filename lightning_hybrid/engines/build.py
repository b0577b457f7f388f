"""From a module and its optimizer to a DeepSpeed engine, and from a frozen module to an evaluation engine."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def build_engine(
    module: nn.Module, optimizer: Optimizer, config: dict[str, Any], *, hybrid: bool = False
) -> DeepSpeedEngine:
    """Wrap ``module`` and its ``optimizer`` into one engine.

    Args:
        module: what the engine owns; every parameter of ``optimizer`` is in it.
        optimizer: a torch optimizer over the module's trainable parameters.
        config: a DeepSpeed config, see :func:`lightning_hybrid.engines.config.engine_config`.
        hybrid: build a :class:`~lightning_hybrid.engines.hybrid.HybridEngine`, which can also generate.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine_class: type[DeepSpeedEngine] = DeepSpeedEngine
    if hybrid:
        from lightning_hybrid.engines.hybrid import HybridEngine

        engine_class = HybridEngine
    # DeepSpeed writes into the config it is given; each engine keeps its own.
    config = copy.deepcopy(config)
    deepspeed.zero.partition_parameters.shutdown_init_context()
    try:
        return engine_class(
            args=None,
            model=module,
            optimizer=optimizer,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config),
        )
    finally:
        deepspeed.zero.partition_parameters.restore_init_context()


def build_evaluation_engine(module: nn.Module, config: dict[str, Any], device: torch.device) -> nn.Module:
    """Make a module without an optimizer ready to evaluate: sharded at ZeRO-3, replicated on ``device`` otherwise.

    Returns:
        A DeepSpeed engine at ZeRO-3, the module itself otherwise. Its parameters require no gradient and it is in
        evaluation mode.
    """
    module.requires_grad_(False).eval()
    if config.get("zero_optimization", {}).get("stage", 0) < 3:
        return module.to(device=device, dtype=config_dtype(config))
    import deepspeed

    # The compute dtype is set here because DeepSpeed's own bf16/fp16 sections expect an optimizer.
    module.to(dtype=config_dtype(config))
    engine: nn.Module
    engine, *_ = deepspeed.initialize(
        model=module, config=copy.deepcopy(config), model_parameters=[], dist_init_required=False
    )
    engine.eval()
    return engine


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype in which an engine with this config computes."""
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32
