"""A plain Hugging Face folder from a checkpoint of a run, or from an adapter and its base; no engine is built.

``lightning-hybrid export checkpoint=outputs/ppo/checkpoints child=actor output_dir=my-model`` takes the newest complete
checkpoint there; one that is named needs quotes around a value with ``=``:
``'checkpoint="outputs/ppo/checkpoints/step=000100.ckpt"'``. ``lightning-hybrid export model.path=outputs/sft/model
output_dir=my-model`` merges the adapter in a folder onto its base.
"""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging as transformers_logging

from lightning_hybrid.config.export import ExportRun
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.export import export_model, reason_to_keep, refuse_form, refuse_to_replace
from lightning_hybrid.export.source import from_checkpoint, from_folder


def export(run: ExportRun) -> Path:
    """Write the folder and return it."""
    transformers_logging.disable_progress_bar()
    folder = Path(run.output_dir)
    refuse_to_replace(folder, reason_to_keep(folder))
    if run.checkpoint is None:
        model, tokenizer, facts = from_folder(run.model)
    else:
        model, tokenizer, facts = from_checkpoint(run.checkpoint, run.child, run.model)
    refuse_form(model.model, run.form)
    export_model(model, folder, tokenizer, run.form, facts)
    print(f"exported: {folder.resolve()}")
    return folder


if __name__ == "__main__":
    recipe_main("export", ExportRun, export)
