"""Lightning's side: the strategy and its names."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_hybrid.strategy.hybrid import HybridDeepSpeedStrategy
from lightning_hybrid.strategy.ownership import EngineSpec

__all__ = ["EngineSpec", "HybridDeepSpeedStrategy", "register_strategies"]

STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid_deepspeed": ("one DeepSpeed engine per optimizer, ZeRO stage 2", {"stage": 2}),
    "hybrid_deepspeed_notebook": (
        "ZeRO stage 2, processes started as from a notebook: the module here gets the trained weights",
        {"stage": 2, "notebook": True},
    ),
    "hybrid_deepspeed_stage_1": ("ZeRO stage 1: optimizer states sharded", {"stage": 1}),
    "hybrid_deepspeed_stage_2": ("ZeRO stage 2: gradients sharded too", {"stage": 2}),
    "hybrid_deepspeed_stage_3": ("ZeRO stage 3: weights sharded too", {"stage": 3}),
    "hybrid_deepspeed_stage_2_offload": (
        "ZeRO stage 2, optimizer states in host memory",
        {"stage": 2, "offload_optimizer": True},
    ),
    "hybrid_deepspeed_stage_3_offload": (
        "ZeRO stage 3, optimizer states and weights in host memory",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}


def register_strategies() -> None:
    """Teach ``Trainer(strategy=...)`` the names in :data:`STRATEGIES`; safe to call again."""
    for name, (description, arguments) in STRATEGIES.items():
        StrategyRegistry.register(name, HybridDeepSpeedStrategy, description, override=True, **arguments)
