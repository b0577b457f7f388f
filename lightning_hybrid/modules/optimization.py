"""AdamW and its learning-rate schedule, from a configuration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_hybrid.config import OptimizerConfig

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


def adamw_with_schedule(
    trainer: Trainer, parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns of a module with one optimizer, whose schedule steps with it."""
    optimizer = make_adamw(parameters, config.lr, config.weight_decay, config.betas)
    total = trainer.estimated_stepping_batches
    schedule = make_schedule(optimizer, config.schedule, config.warmup_steps, total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_adamw(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """AdamW over those of ``parameters`` that require gradients; vectors (norms, biases) are not decayed."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if weight_decay == 0:
        return AdamW(trainable, lr=lr, betas=betas, weight_decay=0.0)
    groups = [
        {"params": [p for p in trainable if _dimensions(p) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if _dimensions(p) <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)


def _dimensions(parameter: nn.Parameter) -> int:
    """Dimensions of the whole parameter; a ZeRO-3 shard is flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def make_schedule(optimizer: Optimizer, schedule: str, warmup_steps: int, total_steps: float) -> LambdaLR:
    """Linear warm-up, then ``constant``, or ``linear`` or ``cosine`` down to 0 at ``total_steps``.

    Args:
        optimizer: whose learning rates to scale.
        schedule: one of the three.
        warmup_steps: steps until the full learning rate; the first step uses ``1 / warmup_steps`` of it.
        total_steps: steps of the run; may be infinite with ``constant``.
    """
    decay = _DECAYS[schedule]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return decay(min(done, 1.0))

    return LambdaLR(optimizer, factor)


def step_schedules(module: LightningModule) -> None:
    """Let every schedule of a module that optimizes by itself know that an iteration has ended."""
    with warnings.catch_warnings():
        # A warming critic or an early stop may leave an optimizer without a step in its first iterations.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        schedules: Any = module.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            schedule.step()


_DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
