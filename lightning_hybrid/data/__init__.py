"""From files to batches: reading, checking, tokenising and collating of prompts, preferences and instructions."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hybrid.data.checking import check_tokenizer, pad_id
from lightning_hybrid.data.reading import Row, read_rows

if TYPE_CHECKING:
    from lightning_hybrid.data.datamodules import (
        InstructionDataModule,
        PreferenceDataModule,
        PromptDataModule,
        UnpairedDataModule,
    )
    from lightning_hybrid.data.prompts import PromptBatch
    from lightning_hybrid.data.task import TaskFiles, TaskSizes, gold_score, task_reward, write_task

# What needs torch or lightning is imported when it is first used.
_LAZY = {
    "InstructionDataModule": "datamodules",
    "PreferenceDataModule": "datamodules",
    "PromptBatch": "prompts",
    "PromptDataModule": "datamodules",
    "TaskFiles": "task",
    "TaskSizes": "task",
    "UnpairedDataModule": "datamodules",
    "gold_score": "task",
    "task_reward": "task",
    "write_task": "task",
}

__all__ = [
    "InstructionDataModule",
    "PreferenceDataModule",
    "PromptBatch",
    "PromptDataModule",
    "Row",
    "TaskFiles",
    "TaskSizes",
    "UnpairedDataModule",
    "check_tokenizer",
    "gold_score",
    "pad_id",
    "read_rows",
    "task_reward",
    "write_task",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lightning_hybrid.data' has no attribute {name!r}")
    return getattr(import_module(f"lightning_hybrid.data.{_LAZY[name]}"), name)
