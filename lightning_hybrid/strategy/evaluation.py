"""Checkpoints where nothing is trained: read to evaluate what they hold, never written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_hybrid.checkpoint import Checkpoint, CheckpointWriter, load_weights
from lightning_hybrid.engines import gathered
from lightning_hybrid.errors import CheckpointError, StrategyError

if TYPE_CHECKING:
    from lightning_hybrid.strategy.hybrid import HybridDeepSpeedStrategy


class EvaluationCheckpoints:
    """What :class:`~lightning_hybrid.strategy.checkpoint.RunCheckpoints` are to training, while there is none.

    Args:
        strategy: whose module is evaluated.
    """

    def __init__(self, strategy: HybridDeepSpeedStrategy) -> None:
        self.strategy = strategy
        self.writer = CheckpointWriter()
        self.owned: set[str] = set()

    def save(self, *_: Any) -> None:
        """Refuse.

        Raises:
            StrategyError: always.
        """
        raise StrategyError("there is nothing to save: engines exist only during fit; use ModelCheckpoint, or HFExport")

    def load(self, folder: str | Path, weights_only: bool) -> dict[str, Any]:
        """Load the weights into the plain modules, before they are sharded; returns Lightning's own state."""
        assert self.strategy.lightning_module is not None
        checkpoint = load_modules(folder, self.strategy.lightning_module)
        self.owned = checkpoint.models
        return checkpoint.lightning_state(weights_only)

    def close(self) -> None:
        """Nothing is being written."""


def load_modules(folder: str | Path, root: nn.Module) -> Checkpoint:
    """Load the weights of every engine of a checkpoint into the modules they belong to, to evaluate them.

    Raises:
        CheckpointError: if it is not what was written, or holds an engine of which ``root`` has no module.
    """
    checkpoint = Checkpoint(folder)
    known = dict(root.named_modules())
    for name in checkpoint.manifest["engines"]:
        if name not in known:
            raise CheckpointError(f"checkpoint '{folder}' has an engine {name!r}, but the module has no such child")
        with gathered(known[name], writable=True):
            load_weights(checkpoint, name, known[name])
    return checkpoint
