"""The data modules: one file for each, over what all of them share."""

from __future__ import annotations

from lightning_hybrid.data.datamodules.instructions import InstructionDataModule
from lightning_hybrid.data.datamodules.preferences import PreferenceDataModule
from lightning_hybrid.data.datamodules.prompts import PromptDataModule
from lightning_hybrid.data.datamodules.unpaired import UnpairedDataModule

__all__ = ["InstructionDataModule", "PreferenceDataModule", "PromptDataModule", "UnpairedDataModule"]
