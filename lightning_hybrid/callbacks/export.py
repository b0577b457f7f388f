"""Leave with a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from typing_extensions import override

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.export import (
    CardFacts,
    Form,
    export_model,
    last_metrics,
    reason_to_keep,
    refuse_config,
    refuse_form,
    refuse_to_replace,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HFExport(L.Callback):
    """Write a trained model, its tokenizer and a model card as a Hugging Face folder when training ends.

    Whether that will be possible is asked before training begins. An earlier export in the folder is replaced when the
    new one is complete; a folder that holds anything else is refused.

    Args:
        folder: where to.
        child: name of the module's child to export, a :class:`~lightning_hybrid.models.Policy` or
            :class:`~lightning_hybrid.models.ScalarModel`.
        tokenizer: written beside the weights.
        form: ``merged`` for a whole model, adapters added into its weights; ``adapter`` for the adapter only.

    Raises:
        ConfigError: when training begins, if the folder holds anything but an earlier export, or the model cannot be
            exported so.
        CheckpointError: when it ends, if the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, child: str, tokenizer: PreTrainedTokenizerBase, form: Form = "merged"
    ) -> None:
        self.folder = Path(folder)
        self.child = child
        self.tokenizer = tokenizer
        self.form: Form = form

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        model = self._child(pl_module).model
        refuse_form(model, self.form)
        if self.form == "merged":
            refuse_config(model, self.tokenizer)
        # One rank looks, and all hear: the others may not see the same folder.
        reason = reason_to_keep(self.folder) if trainer.is_global_zero else None
        refuse_to_replace(self.folder, trainer.strategy.broadcast(reason))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the model as it is now."""
        self.write(trainer, pl_module)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule, origin: str | None = None) -> None:
        """Gather the weights a parameter at a time where they are sharded, and write them on rank 0.

        Args:
            trainer: in whose training the model was made.
            pl_module: with the child.
            origin: for the card, a sentence on what the weights are, where they are not those that were trained, and
                so not those that the metrics are of.
        """
        child = self._child(pl_module)
        export_model(child, self.folder, self.tokenizer, self.form, _facts(trainer, child, origin))

    def _child(self, module: L.LightningModule) -> Any:
        try:
            return module.get_submodule(self.child)
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children())
            raise ConfigError(
                f"cannot export {self.child!r}: the module has no such child; it has: {children}"
            ) from None


def _facts(trainer: L.Trainer, wrapper: Any, origin: str | None) -> CardFacts:
    """What the card says, asked of those who know."""
    data: Any = getattr(trainer, "datamodule", None)
    return CardFacts(
        base=wrapper.config.name_or_path or None,
        config=getattr(trainer.strategy, "run_config", None),
        data=None if data is None else data.state_dict(),
        metrics=last_metrics(trainer) if origin is None else {},
        step=trainer.global_step,
        origin=origin,
    )
