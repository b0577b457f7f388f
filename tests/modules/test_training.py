"""Supervised fine-tuning and reward modelling learn, on losses that are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid import (
    InstructionDataModule,
    PreferenceDataModule,
    RewardConfig,
    RewardModule,
    SFTConfig,
    SFTModule,
)
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.data.task import NOUNS, TaskFiles, TaskSizes, build_tokenizer, write_task
from lightning_hybrid.models import load_policy, load_scalar, load_tokenizer
from lightning_hybrid.modules.likelihood import next_token_loss
from lightning_hybrid.modules.roles import scalar_from_policy
from lightning_hybrid.rewards import LearnedReward
from tests.helpers import quiet_trainer, tiny_policy, weights_of


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    return write_task(tmp_path_factory.mktemp("task"), sizes=TaskSizes(sft=256, preferences=256))


def test_sft_averages_over_responses_only() -> None:
    module = SFTModule(tiny_policy().eval())
    tokens = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    counts = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    total, count = next_token_loss(module.policy, {"input_ids": tokens, "attention_mask": mask, "loss_mask": counts})
    logp = module.policy.model(tokens).logits.float().log_softmax(-1)
    expected = -(logp[0, 2, 7] + logp[0, 3, 2] + logp[1, 1, 9] + logp[1, 2, 2]) / 4
    torch.testing.assert_close(total / count, expected)


@pytest.mark.parametrize("stage", ["hybrid_deepspeed_stage_1", "hybrid_deepspeed_stage_3"])
def test_sft_learns_and_leaves_a_folder_that_loads_with_the_same_weights(
    task: TaskFiles, tmp_path: Path, stage: str
) -> None:
    tokenizer = build_tokenizer()
    module = SFTModule(tiny_policy(), SFTConfig(lr=1e-2, schedule="cosine"))
    data = InstructionDataModule(str(task.sft), tokenizer=tokenizer, batch_size=32, validation_fraction=0.2)
    trainer = quiet_trainer(stage, max_epochs=2, callbacks=[HFExport(tmp_path / "model", "policy", tokenizer)])
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/loss"] < 2.6  # ln 49 = 3.9 before
    loaded = load_policy(tmp_path / "model")
    assert torch.equal(weights_of(loaded), weights_of(module.policy))
    assert load_tokenizer(tmp_path / "model").get_vocab() == tokenizer.get_vocab()


def warm_over_cold(path: Path) -> str:
    """Pairs that differ in one word, so that a tiny model can tell them apart."""
    rows = [
        {
            "chosen": f"the {noun} is warm . the {other} is soft .",
            "rejected": f"the {noun} is cold . the {other} is soft .",
        }
        for noun in NOUNS
        for other in NOUNS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_reward_model_learns_the_order_of_pairs_and_scores_text_as_in_training(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    module = RewardModule(scalar_from_policy(tiny_policy()), RewardConfig(lr=1e-2))
    data = PreferenceDataModule(warm_over_cold(tmp_path / "pairs.jsonl"), tokenizer=tokenizer, batch_size=16)
    callbacks = [HFExport(tmp_path / "model", "model", tokenizer)]
    trainer = quiet_trainer("hybrid_deepspeed", max_epochs=6, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["accuracy"] > 0.95
    reward = LearnedReward(load_scalar(tmp_path / "model").eval(), load_tokenizer(tmp_path / "model"))
    batch = next(iter(data.val_dataloader() or data.train_dataloader()))
    texts = tokenizer.batch_decode(batch["chosen"]["input_ids"], skip_special_tokens=True)
    expected = module.model.eval().score(batch["chosen"]["input_ids"], batch["chosen"]["attention_mask"])
    torch.testing.assert_close(reward([""] * len(texts), texts), expected.detach(), rtol=1e-4, atol=1e-5)


def test_margins_enter_the_reward_loss() -> None:
    module = RewardModule(scalar_from_policy(tiny_policy()))
    side = {"input_ids": torch.tensor([[1, 5, 2]]), "attention_mask": torch.ones(1, 3).bool()}
    batch: dict[str, Any] = {"chosen": side, "rejected": side}
    assert module._compare(batch)[0].item() == pytest.approx(0.6931, abs=1e-4)
    batch["margin"] = torch.tensor([1.0])
    assert module._compare(batch)[0].item() == pytest.approx(1.3133, abs=1e-4)  # -log sigmoid(-1)
