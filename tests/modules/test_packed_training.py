"""Packed fine-tuning is unpacked fine-tuning: the same loss and gradient, on a real model and real texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hybrid.config import SFTConfig
from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy, load_policy, load_tokenizer
from lightning_hybrid.modules import SFTModule
from lightning_hybrid.modules.likelihood import next_token_loss
from tests.helpers import quiet_trainer
from tests.models.test_policy import family

MODEL = "models/tinystories-656k"
ALPACA = {"path": "data/llamafactory_alpaca_en_demo.json", "template": "plain", "chat": True}


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Whole texts, one per line."""
    whole = (shared / "data/tinystories_sample_2MB.txt").read_text()
    texts = [" ".join(text.split()) for text in whole.split("<|endoftext|>")[:-1]]
    file = tmp_path_factory.mktemp("stories") / "stories.txt"
    file.write_text("\n".join(text for text in texts if text))
    return {"path": str(file), "format": "lines", "prompt_key": None, "response_key": "text"}


def batches(shared: Path, source: dict[str, Any], packing: bool) -> list[dict[str, Tensor]]:
    module = InstructionDataModule(
        **{**source, "path": str(shared / source["path"])},
        tokenizer=load_tokenizer(str(shared / MODEL)),
        packing=packing,
        limit=60,
        max_length=512,
        batch_size=4,
    )
    module.setup()
    return list(module.train_dataloader())


def loss_and_gradient(module: SFTModule, batches: list[dict[str, Tensor]]) -> tuple[float, int, Tensor]:
    """Loss per token over all batches, how many tokens count, and its gradient."""
    module.zero_grad()
    sums = [next_token_loss(module.policy, batch) for batch in batches]
    count = sum(int(n) for _, n in sums)
    loss = sum(total for total, _ in sums) / count
    loss.backward()
    return float(loss.detach()), count, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["alpaca", "stories"])
def test_packed_texts_have_the_loss_and_the_gradient_of_texts_alone(
    shared: Path, stories: dict[str, Any], name: str
) -> None:
    source = {"alpaca": ALPACA, "stories": stories}[name]
    module = SFTModule(load_policy(str(shared / MODEL)))
    module.eval()
    alone, packed = batches(shared, source, False), batches(shared, source, True)
    rows, fewer = (sum(len(batch["input_ids"]) for batch in given) for given in (alone, packed))
    loss, count, gradient = loss_and_gradient(module, alone)
    packed_loss, packed_count, packed_gradient = loss_and_gradient(module, packed)
    print(f"{name}: {rows} texts in {fewer} rows; loss {loss:.6f}, packed {packed_loss:.6f}")
    assert fewer < rows / 2
    assert packed_count == count
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, atol=1e-5 * float(gradient.abs().max()), rtol=0)


def test_a_packed_batch_restarts_positions_and_numbers_its_texts(shared: Path) -> None:
    for batch in batches(shared, ALPACA, True):
        assert batch["input_ids"].shape[1] <= 512
        assert torch.equal(batch["sequence"] > 0, batch["attention_mask"])
        assert not batch["loss_mask"][~batch["attention_mask"]].any()
        starts = batch["attention_mask"] & (batch["position_ids"] == 0)
        assert torch.equal(starts.sum(1), batch["sequence"].amax(1))
        assert (batch["input_ids"][starts] == 1).all()  # BOS


def test_training_on_packed_rows_lowers_the_loss(shared: Path) -> None:
    data = InstructionDataModule(
        **{**ALPACA, "path": str(shared / ALPACA["path"])},
        tokenizer=load_tokenizer(str(shared / MODEL)),
        packing=True,
        limit=60,
        batch_size=2,
        max_length=512,
    )
    module = SFTModule(load_policy(str(shared / MODEL)), SFTConfig(lr=1e-3))
    losses: list[float] = []
    module.log = lambda name, value, **_: losses.append(float(value)) if name == "loss" else None  # type: ignore[method-assign]
    quiet_trainer("auto", max_epochs=4).fit(module, datamodule=data)
    batches = len(losses) // 4
    first, last = (sum(epoch) / batches for epoch in (losses[:batches], losses[-batches:]))
    assert last < first - 0.5


def test_a_model_that_cannot_keep_texts_apart_is_refused_before_training(shared: Path) -> None:
    data = InstructionDataModule(
        **{**ALPACA, "path": str(shared / ALPACA["path"])},
        tokenizer=load_tokenizer(str(shared / MODEL)),
        packing=True,
        max_length=64,
    )
    module = SFTModule(Policy(family("bloom")))
    with pytest.raises(ConfigError, match="a bloom model takes no position_ids.*set packing=false"):
        quiet_trainer("auto", max_epochs=1).fit(module, datamodule=data)
