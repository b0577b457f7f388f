"""Supervised fine-tuning: a causal LM learns to continue prompts with responses, or to write texts like those given.

Conversations pass through the tokenizer's chat template, or the one that ``data.template`` names, which the model then
takes along; every answer of the assistant is learned. Out comes a Hugging Face folder, ``<output_dir>/model``.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_hybrid.assemble import data_arguments, make_policy, make_tokenizer, make_trainer, resolve_checkpoint
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.config import SFTRun
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.modules import SFTModule


def train_sft(run: SFTRun, stage: str = "sft") -> Path:
    """Train and return the folder of the model."""
    L.seed_everything(run.seed, verbose=False)
    tokenizer = make_tokenizer(run.model)
    policy = make_policy(run.model, tokenizer)
    data = InstructionDataModule(**data_arguments(run.data, tokenizer, policy))
    module = SFTModule(policy, run.algorithm)
    folder = Path(run.output_dir) / "model"
    trainer = make_trainer(run, stage, HFExport(folder, "policy", tokenizer))
    trainer.fit(module, datamodule=data, ckpt_path=resolve_checkpoint(run))
    return folder


if __name__ == "__main__":
    recipe_main("sft", SFTRun, train_sft)
