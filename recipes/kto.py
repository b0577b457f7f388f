"""Kahneman–Tversky optimization: a policy learns from single responses that are good or bad; nothing is sampled.

The reference is the policy as it starts (with an adapter: the model under it), or ``model.reference``. Out comes a
Hugging Face folder, ``<output_dir>/model``.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_hybrid.assemble import data_arguments, make_policy, make_tokenizer, make_trainer, resolve_checkpoint
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.config import KTORun
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.data import UnpairedDataModule
from lightning_hybrid.modules import KTOModule


def train_kto(run: KTORun, stage: str = "kto") -> Path:
    """Train and return the folder of the policy."""
    L.seed_everything(run.seed, verbose=False)
    tokenizer = make_tokenizer(run.model)
    policy = make_policy(run.model, tokenizer, run.algorithm.logprob_chunk)
    data = UnpairedDataModule(**data_arguments(run.data, tokenizer, policy))
    module = KTOModule(policy, run.model.reference, run.algorithm)
    folder = Path(run.output_dir) / "model"
    trainer = make_trainer(run, stage, HFExport(folder, "policy", tokenizer))
    trainer.fit(module, datamodule=data, ckpt_path=resolve_checkpoint(run))
    return folder


if __name__ == "__main__":
    recipe_main("kto", KTORun, train_kto)
