from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_hybrid.data as data
from lightning_hybrid.data.datamodules.arguments import CommonArguments, ToldDataModule

PACKAGE = Path(data.__file__).parent


def test_reading_and_the_task_need_neither_lightning_nor_torch_nor_transformers():
    code = f"""
import importlib, sys, types
package = types.ModuleType("lightning_hybrid"); package.__path__ = [{str(PACKAGE.parent)!r}]
sys.modules["lightning_hybrid"] = package
importlib.import_module("lightning_hybrid.data.task")
importlib.import_module("lightning_hybrid.data.reading")
print(sorted({{"lightning", "torch", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(data, name) for name in data.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Judge'"):
        data.Judge  # noqa: B018


def test_the_typed_common_arguments_are_those_of_the_base():
    parameters = set(inspect.signature(ToldDataModule.__init__).parameters) - {"self", "path"}
    assert set(CommonArguments.__annotations__) == parameters


def arguments_of(module: type) -> set[str]:
    """Names of the arguments of a data module, also of those that it hands on to the classes above it."""
    return {name for kind in module.__mro__ for name in inspect.signature(kind.__init__).parameters}


def test_every_setting_of_the_configuration_is_an_argument():
    from lightning_hybrid.config import data as config

    for settings, module in (
        (config.InstructionDataConfig, data.InstructionDataModule),
        (config.PreferenceDataConfig, data.PreferenceDataModule),
        (config.PromptDataConfig, data.PromptDataModule),
        (config.UnpairedDataConfig, data.UnpairedDataModule),
    ):
        assert set(settings.model_fields) <= arguments_of(module)
        assert arguments_of(module) <= {
            *settings.model_fields,
            "self",
            "tokenizer",
            "max_new_tokens",
            "common",
            "args",
            "kwargs",
        }
