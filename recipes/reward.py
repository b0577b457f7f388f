"""A reward model: preferred texts score higher than others.

It starts from the trunk of a causal LM (the SFT model as a rule) with a new head. Out comes a Hugging Face folder,
``<output_dir>/model``, and with it, where pairs are drawn from labelled texts, its accuracy over ALL validation pairs.
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import torch

from lightning_hybrid.assemble import data_arguments, make_scalar, make_tokenizer, make_trainer, resolve_checkpoint
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.config import RewardRun
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.data import PreferenceDataModule, check_tokenizer
from lightning_hybrid.models import load_scalar, load_tokenizer
from lightning_hybrid.modules import RewardModule
from lightning_hybrid.rewards import LearnedReward


def train_reward(run: RewardRun, stage: str = "reward") -> Path:
    """Train and return the folder of the model."""
    L.seed_everything(run.seed, verbose=False)
    tokenizer = make_tokenizer(run.model)
    model = make_scalar(run.model)
    check_tokenizer(tokenizer, model.config.get_text_config().vocab_size)
    data = PreferenceDataModule(**data_arguments(run.data, tokenizer, model))
    folder = Path(run.output_dir) / "model"
    trainer = make_trainer(run, stage, HFExport(folder, "model", tokenizer))
    trainer.fit(RewardModule(model, run.algorithm), datamodule=data, ckpt_path=resolve_checkpoint(run))
    validated = run.data.validation_path is not None or run.data.validation_fraction > 0
    if trainer.is_global_zero and run.data.pairing == "labels" and validated and run.callbacks.export_model:
        report_accuracy(folder, data)
    return folder


def report_accuracy(folder: Path, data: PreferenceDataModule) -> float:
    """Score every validation text once; print and write the share of all pairs that are in the right order."""
    reward = LearnedReward(load_scalar(folder), load_tokenizer(folder))
    positive, negative = (reward.score_ids(data.encode(texts)) for texts in data.validation_texts())
    lead = positive[:, None] - negative[None, :]
    accuracy = float((lead.sign() / 2 + 0.5).mean(dtype=torch.float64))
    (folder.parent / "accuracy.json").write_text(
        json.dumps({"accuracy_over_all_pairs": accuracy, "pairs": lead.numel()})
    )
    print(f"reward model: {accuracy:.4f} of {lead.numel():,} validation pairs in the right order")
    return accuracy


if __name__ == "__main__":
    recipe_main("reward", RewardRun, train_reward)
