"""One DeepSpeed engine per role. ``engines.hybrid`` needs DeepSpeed and is imported where it is used."""

from lightning_hybrid.engines.build import build_engine, build_evaluation_engine, cast_parameters, config_dtype
from lightning_hybrid.engines.config import engine_config
from lightning_hybrid.engines.environment import prepare_deepspeed
from lightning_hybrid.engines.gather import gathered, is_sharded
from lightning_hybrid.engines.gradients import backward, discard_gradients
from lightning_hybrid.engines.optimizer import EngineOptimizer

__all__ = [
    "EngineOptimizer",
    "backward",
    "build_engine",
    "build_evaluation_engine",
    "cast_parameters",
    "config_dtype",
    "discard_gradients",
    "engine_config",
    "gathered",
    "is_sharded",
    "prepare_deepspeed",
]
