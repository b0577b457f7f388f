"""The DeepSpeed config of an engine, from what the Trainer and the strategy were told."""

from __future__ import annotations

import copy
from typing import Any

from lightning_hybrid.errors import StrategyError

PRECISION_SECTIONS: dict[str, dict[str, Any]] = {
    "32-true": {},
    "bf16-true": {"bf16": {"enabled": True}},
    "bf16-mixed": {"bf16": {"enabled": True}},
    "16-true": {"fp16": {"enabled": True}},
    "16-mixed": {"fp16": {"enabled": True}},
}


def engine_config(
    *,
    stage: int,
    precision: str,
    gradient_clipping: float = 0.0,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    hybrid_engine: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write one engine's DeepSpeed config.

    Args:
        stage: ZeRO stage, 0 to 3.
        precision: a Lightning precision; ``*-mixed`` and ``*-true`` alike keep fp32 master weights in the optimizer.
        gradient_clipping: maximum norm over all of the engine's gradients; 0 for none.
        offload_optimizer: hold optimizer states in host memory.
        offload_parameters: hold parameters in host memory (ZeRO-3).
        hybrid_engine: the ``hybrid_engine`` section; a hybrid engine is built where it is given.
        overrides: DeepSpeed keys merged over all of this, section by section.

    Raises:
        StrategyError: for accumulation by DeepSpeed, beside the Trainer's.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The caller decides when a step is due: PPO's minibatches and Lightning's accumulation both do.
        "managed_gradient_accumulation": False,
        "gradient_clipping": gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": None,
        **copy.deepcopy(PRECISION_SECTIONS[precision]),
    }
    if hybrid_engine is not None:
        config["hybrid_engine"] = {"enabled": True, **hybrid_engine}
    config = merged(config, overrides or {})
    if config["gradient_accumulation_steps"] != 1 or config["managed_gradient_accumulation"]:
        raise StrategyError(
            "gradient accumulation belongs to the Trainer: leave gradient_accumulation_steps and "
            "managed_gradient_accumulation out of the DeepSpeed config and set accumulate_grad_batches"
        )
    return config


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on top, section by section."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
