"""Leave with a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from typing_extensions import override

from lightning_hybrid.engines import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HFExport(L.Callback):
    """Write a trained model and its tokenizer as a Hugging Face folder when training ends.

    Args:
        folder: where to; overwritten.
        child: name of the module's child to export, a :class:`~lightning_hybrid.models.Policy` or
            :class:`~lightning_hybrid.models.ScalarModel`.
        tokenizer: written beside the weights.
    """

    def __init__(self, folder: str | Path, child: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = Path(folder)
        self.child = child
        self.tokenizer = tokenizer

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather the weights where they are sharded, and write them on rank 0."""
        wrapper: Any = pl_module.get_submodule(self.child)
        with gathered(wrapper):
            if trainer.is_global_zero:
                wrapper.model.save_pretrained(self.folder)
                self.tokenizer.save_pretrained(self.folder)
        trainer.strategy.barrier("exported")
