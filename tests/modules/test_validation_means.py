"""Validation on several ranks: rows that a sampler repeats, so that all ranks have as many, count once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_hybrid.data import InstructionDataModule, PreferenceDataModule, UnpairedDataModule
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.modules import DPOModule, KTOModule, RewardModule, SFTModule
from lightning_hybrid.modules.means import rows_that_count
from lightning_hybrid.modules.roles import scalar_from_policy
from tests.helpers import quiet_trainer, tiny_policy

PAIRS = [{"prompt": "mia visits", "chosen": "the " * (n + 1), "rejected": "soup . " * (n + 1)} for n in range(5)]
SAID = [{"prompt": "mia visits", "response": "the " * (n + 1), "label": n % 2} for n in range(5)]


@pytest.mark.parametrize(("rows", "ranks", "size"), [(5, 2, 2), (5, 2, 1), (6, 2, 2), (1, 3, 4), (10, 4, 3)])
def test_every_row_counts_on_one_rank(rows: int, ranks: int, size: int) -> None:
    seen = []
    for rank in range(ranks):
        sampler = DistributedSampler(range(rows), ranks, rank, shuffle=False)  # type: ignore[arg-type, var-annotated]
        loader = DataLoader(range(rows), batch_size=size, sampler=sampler)  # type: ignore[arg-type, var-annotated]
        trainer: Any = SimpleNamespace(val_dataloaders=loader)
        for number, batch in enumerate(loader):
            seen += batch[: rows_that_count(trainer, number, len(batch))].tolist()
    assert sorted(seen) == list(range(rows))


def test_all_rows_count_of_a_loader_that_deals_none_out() -> None:
    trainer: Any = SimpleNamespace(val_dataloaders=[DataLoader(range(5), batch_size=2)])  # type: ignore[arg-type]
    assert [rows_that_count(trainer, number, rows) for number, rows in enumerate((2, 2, 1))] == [2, 2, 1]


def validate_on_ranks(folder: str, ranks: int) -> None:
    """Write the figures of a validation of each module down, on rows that do not come out even."""
    tokenizer, reference = build_tokenizer(), tiny_policy()
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": 4 // ranks}
    path = f"{folder}/{{}}.jsonl"
    cells: dict[str, tuple[Any, Any]] = {
        "sft": (SFTModule(tiny_policy(1)), InstructionDataModule),
        "reward": (RewardModule(scalar_from_policy(tiny_policy(1))), PreferenceDataModule),
        "dpo": (DPOModule(tiny_policy(1), reference), PreferenceDataModule),
        "kto": (KTOModule(tiny_policy(1), reference), UnpairedDataModule),
    }
    figures = {}
    for name, (module, kind) in cells.items():
        if name == "reward":
            torch.nn.init.normal_(module.model.model.score.weight)  # which is zero at first
        file = path.format("pairs" if kind is PreferenceDataModule else "said")
        data = kind(file, validation_path=file, **arguments)
        trainer = quiet_trainer("hybrid_deepspeed", devices=ranks, use_distributed_sampler=True)
        (figures[name],) = trainer.validate(module, datamodule=data, verbose=False)
    rank = torch.distributed.get_rank()
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(figures))


@pytest.mark.slow
def test_two_ranks_find_the_figures_of_one(run_ranks: Any, tmp_path: Path) -> None:
    for name, rows in (("pairs", PAIRS), ("said", SAID)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ranks in (1, 2):
        run_ranks(validate_on_ranks, ranks, str(tmp_path), ranks)
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    for other in two:
        for name, figures in one.items():
            # KTO's baseline comes of rows that are mismatched within each rank.
            compared = {key: value for key, value in figures.items() if name != "kto" or "logps" in key}
            assert compared
            assert {key: other[name][key] for key in compared} == pytest.approx(compared, rel=1e-5), name
