"""Settings of the recipe `export`: a Hugging Face folder from a checkpoint, or from an adapter and its base."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lightning_hybrid.settings import Problem, Rule, Settings


def _one_source(run: ExportRun) -> Problem | None:
    if run.checkpoint is not None or run.model.path is not None:
        return None
    return Problem("checkpoint", "give the checkpoint of a run, or model.path: the folder of an adapter", "None")


def _children_are_of_checkpoints(run: ExportRun) -> Problem | None:
    if run.child is None or run.checkpoint is not None:
        return None
    return Problem("child", "names a model of a checkpoint: give checkpoint, or leave it out", repr(run.child))


class ExportedModelConfig(Settings):
    """What is exported, or what a checkpoint does not say."""

    path: str | None = None
    """folder of an adapter to merge; with a checkpoint, where its run's model lies now, null for where it lay then"""
    base: str | None = None
    """folder or hub name of an adapter's base; null for where the adapter says"""
    tokenizer: str | None = None
    """folder or hub name of the tokenizer; null for the one beside the model"""


class ExportRun(Settings):
    """Configuration of the recipe `export`."""

    rules: ClassVar[tuple[Rule, ...]] = (_one_source, _children_are_of_checkpoints)

    checkpoint: str | None = None
    """checkpoint of a run, a folder; or a folder of checkpoints, for the newest complete one"""
    child: str | None = None
    """which of the checkpoint's models, such as actor or critic; null for the policy, or the only one"""
    model: ExportedModelConfig = Field(default_factory=ExportedModelConfig)
    """what is exported, or what a checkpoint does not say"""
    form: Literal["merged", "adapter"] = "merged"
    """merged: a whole model, adapters added into its weights; adapter: the adapter only"""
    output_dir: str
    """folder to write to: new, empty, or an earlier export"""
