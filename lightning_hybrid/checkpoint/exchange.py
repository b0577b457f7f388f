"""Trained weights, exchanged for a state that the optimizer keeps of them, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_hybrid.checkpoint.engine_state import spread_weights
from lightning_hybrid.checkpoint.fragments import flat_tensors

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def exchange_weights(engine: DeepSpeedEngine, state: str) -> None:
    """Swap an engine's full-precision weights with a state of the same size, and compute with them; all ranks call it.

    Called twice, everything is as it was, bit for bit. A weight that has no such state stays.

    Args:
        engine: at any ZeRO stage.
        state: key of the state in the torch optimizer inside the engine; in the weights' own precision.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        for flat in flat_tensors(engine):
            held = engine.basic_optimizer.state.get(flat.values, {}).get(state)
            if held is not None:
                weights = flat.values.clone()
                flat.values.copy_(held)
                held.copy_(weights)
    spread_weights(engine)
