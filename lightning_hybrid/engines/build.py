"""From a module and its optimizer to a DeepSpeed engine, and from a frozen module to an evaluation engine."""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hybrid.containers import lay_out, order_parameters
from lightning_hybrid.errors import StrategyError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def build_engine(
    module: nn.Module,
    optimizer: Optimizer,
    config: dict[str, Any],
    *,
    hybrid: bool = False,
    device: torch.device | None = None,
) -> DeepSpeedEngine:
    """Wrap ``module`` and its ``optimizer`` into one engine.

    Args:
        module: what the engine owns; every parameter of ``optimizer`` is in it.
        optimizer: a torch optimizer over the module's trainable parameters.
        config: a DeepSpeed config, see :func:`lightning_hybrid.engines.config.engine_config`.
        device: where to put the module; by default the device of this process's local rank.
        hybrid: build a :class:`~lightning_hybrid.engines.hybrid.HybridEngine`, which can also generate.

    Raises:
        StrategyError: for combinations that DeepSpeed accepts but does not train right.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine_class: type[DeepSpeedEngine] = DeepSpeedEngine
    if hybrid:
        from lightning_hybrid.engines.hybrid import HybridEngine

        engine_class = HybridEngine
    _refuse_what_trains_wrong(optimizer, config)
    if hybrid:
        # DeepSpeed flattens each group in its order: sets of projections become adjacent, and containers need no copy.
        order_parameters(optimizer, causal_lm_in(module))
    # DeepSpeed writes into the config it is given; each engine keeps its own.
    config = copy.deepcopy(config)
    deepspeed.zero.partition_parameters.shutdown_init_context()
    try:
        engine = engine_class(
            args=_device_arguments(device),
            model=module,
            optimizer=optimizer,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            dist_init_required=False,
            config=config,
            config_class=DeepSpeedConfig(config),
        )
    finally:
        deepspeed.zero.partition_parameters.restore_init_context()
    if hybrid:
        lay_out(causal_lm_in(module))  # what DeepSpeed did not flatten: at stage 0, and under adapters
    return engine


def _refuse_what_trains_wrong(optimizer: Optimizer, config: dict[str, Any]) -> None:
    stage = config["zero_optimization"]["stage"]
    low_precision = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), None)
    if stage == 0 and low_precision:
        raise StrategyError(
            f"ZeRO stage 0 with {low_precision} steps Adam on rounded weights: "
            "use stage 1 (fp32 master weights, the same memory on one rank), or precision='32-true'"
        )
    if stage > 0 and isinstance(optimizer, torch.optim.Adagrad):
        raise StrategyError(
            "DeepSpeed replaces Adagrad by one of its own at ZeRO stages 1 to 3, which schedules and checkpoints do "
            "not reach: use stage 0, or another optimizer"
        )


def causal_lm_in(module: Any) -> Any:
    """The Hugging Face causal LM inside, whether ``module`` is one or wraps one."""
    inner = getattr(module, "model", None)
    return inner if hasattr(inner, "generate") else module


def build_evaluation_engine(module: nn.Module, config: dict[str, Any], device: torch.device) -> nn.Module:
    """Make a module without an optimizer ready to evaluate: sharded at ZeRO-3, replicated on ``device`` otherwise.

    Returns:
        A DeepSpeed engine at ZeRO-3, the module itself otherwise.
    """
    cast_parameters(module, config_dtype(config))
    if config.get("zero_optimization", {}).get("stage", 0) < 3:
        return module.to(device)
    import deepspeed

    engine: nn.Module
    engine, *_ = deepspeed.initialize(
        args=_device_arguments(device),
        model=module,
        config=copy.deepcopy(config),
        model_parameters=[],
        dist_init_required=False,
    )
    return engine


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters, and leave buffers: rotary frequencies in bf16 move distant tokens."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def _device_arguments(device: torch.device | None) -> argparse.Namespace | None:
    """DeepSpeed takes the local rank for the device's index; ``devices=[1]`` makes them differ."""
    return None if device is None or device.index is None else argparse.Namespace(device_rank=device.index)


def config_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype in which an engine with this config computes."""
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32
