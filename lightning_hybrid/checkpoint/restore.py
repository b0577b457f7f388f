"""Read a checkpoint: checked first, by all ranks together; refused where it is not what was written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_hybrid.checkpoint import folder as folders
from lightning_hybrid.checkpoint.engine_state import WEIGHT
from lightning_hybrid.checkpoint.fragments import shape_of
from lightning_hybrid.checkpoint.loader import Position
from lightning_hybrid.checkpoint.manifest import entries, problem_of, read_manifest
from lightning_hybrid.checkpoint.tensors import Stretches, read_tensors
from lightning_hybrid.engines.agreement import number_of_ranks, of_all_ranks, on_every_rank, own_rank
from lightning_hybrid.errors import CheckpointError

LIGHTNING = "lightning.ckpt"


def engine_folder(name: str) -> str:
    """Where an engine's files lie; the engine of the whole module has no name."""
    return f"engines/{name or 'module'}"


def rank_file(folder: str, rank: int, kind: str = "rank") -> str:
    """A rank's file in a folder."""
    return f"{folder}/{kind}-{rank:05d}.safetensors"


class Checkpoint:
    """A checkpoint folder that is what was written; each rank reads a share of the files to know it.

    Args:
        folder: the checkpoint's.

    Raises:
        CheckpointError: on every rank, naming the files that are not, and the newest complete checkpoint beside it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = on_every_rank(self._checked, "reading the checkpoint", CheckpointError)
        self._refuse_several()

    def _checked(self) -> dict[str, Any]:
        try:
            manifest = read_manifest(self.folder)
        except CheckpointError as error:
            raise folders.refused(self.folder, str(error)) from error
        mine = entries(manifest)[own_rank() :: number_of_ranks()]
        found = [problem for problem in (problem_of(self.folder, entry) for entry in mine) if problem is not None]
        if found:
            raise folders.refused(self.folder, "; ".join(found[:5]))
        return manifest

    def _refuse_several(self) -> None:
        """Ranks look for themselves, and a folder that they share may not look the same to all at once."""
        read = of_all_ranks((str(self.folder), self.manifest["global_step"]))
        if len({step for _, step in read}) > 1:
            raise CheckpointError(f"ranks read different checkpoints: {read}; give ckpt_path as the path of one")

    @property
    def ranks(self) -> int:
        """That wrote it."""
        return int(self.manifest["ranks"])

    @property
    def models(self) -> set[str]:
        """Names of the engines and frozen models whose weights are not in Lightning's own state."""
        return {*self.manifest["engines"], *self.manifest["frozen"]}

    def stretches(self, folder: str, kind: str = "rank") -> Stretches:
        """What all ranks wrote in a folder."""
        return Stretches(self.folder / rank_file(folder, rank, kind) for rank in range(self.ranks))

    def buffers(self, name: str) -> dict[str, torch.Tensor]:
        """An engine's, as this rank wrote them; rank 0's on ranks that there were not."""
        rank = own_rank() if self.ranks == number_of_ranks() else 0
        return read_tensors(self.folder / rank_file(engine_folder(name), rank, "buffers"))

    def summary(self, name: str) -> dict[str, Any]:
        """What all ranks knew of an engine."""
        text = (self.folder / engine_folder(name) / "engine.json").read_text(encoding="utf-8")
        summary: dict[str, Any] = json.loads(text)
        return summary

    def positions(self) -> list[Position]:
        """Where in each training loader the run stands; streams of this rank, or none with another number of ranks."""
        same = self.ranks == number_of_ranks()
        tensors = read_tensors(self.folder / rank_file("streams", own_rank() if same else 0))
        positions = []
        for index in range(int(self.manifest["loaders"])):
            prefix = f"{index}/"
            own = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            if "batches" not in own:
                raise CheckpointError(f"checkpoint '{self.folder}' has no position of loader {index}")
            position = Position.from_tensors(own)
            positions.append(position if same else replace(position, now={}))
        return positions

    def lightning_state(self, weights_only: bool = True) -> dict[str, Any]:
        """Lightning's own state; with ``weights_only``, nothing in it is executed.

        Raises:
            CheckpointError: if it holds more than plain data.
        """
        path = self.folder / LIGHTNING
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"'{path}' holds more than plain data, and nothing in it was executed: {str(error).splitlines()[0]} "
                "Where you trust it, pass weights_only=False to Trainer.fit"
            ) from error
        return state


def load_weights(checkpoint: Checkpoint, name: str, module: nn.Module) -> None:
    """Fill a plain module with the weights of an engine, to evaluate it.

    Raises:
        CheckpointError: if it lacks a trained parameter of the engine, or has it in another shape.
    """
    stretches, saved = checkpoint.stretches(engine_folder(name)), checkpoint.summary(name)["parameters"]
    own = dict(module.named_parameters())
    wrong = sorted(key for key, shape in saved.items() if key not in own or shape_of(own[key]) != shape)
    if wrong:
        raise CheckpointError(
            f"checkpoint '{checkpoint.folder}' is of another model: {name or 'the module'} has no {wrong[0]!r} of "
            f"shape {saved[wrong[0]]}, nor {len(wrong) - 1} more of its parameters"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            if f"{key}:{WEIGHT}" in stretches:
                values = stretches.whole(f"{key}:{WEIGHT}", parameter.numel())
                parameter.copy_(values.view(parameter.shape))
        buffers = dict(module.named_buffers())
        for key, value in checkpoint.buffers(name).items():
            if key in buffers:
                buffers[key].copy_(value)


def refuse_other_engines(checkpoint: Checkpoint, engines: Mapping[str, Any]) -> None:
    """Raise where a checkpoint lacks an engine of the run, or holds another.

    Raises:
        CheckpointError: naming them.
    """
    saved, mine = set(checkpoint.manifest["engines"]), set(engines)
    if saved != mine:
        raise CheckpointError(
            f"checkpoint '{checkpoint.folder}' holds the engines {sorted(saved)}, and this run has {sorted(mine)}"
        )
