"""What of a run goes into a checkpoint, and comes back from it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_hybrid.checkpoint import (
    LIGHTNING,
    Checkpoint,
    CheckpointWriter,
    Part,
    TensorFile,
    differences,
    engine_folder,
    engine_state,
    fingerprints,
    frozen_parameters,
    frozen_tensors,
    merged_numbers,
    rank_file,
    refuse_other_engines,
    refuse_other_weights,
    restore_engine,
    restore_frozen,
)
from lightning_hybrid.data.checking import notice
from lightning_hybrid.engines.agreement import of_all_ranks
from lightning_hybrid.errors import CheckpointError
from lightning_hybrid.export.card import last_metrics
from lightning_hybrid.strategy.lost_ranks import seconds
from lightning_hybrid.strategy.progress import Progress

if TYPE_CHECKING:
    from lightning_hybrid.strategy.hybrid import HybridDeepSpeedStrategy

VALUE = "value"
GRACE_SECONDS = 60.0


class RunCheckpoints:
    """Checkpoints of everything that a strategy's engines, frozen models, data loaders and random streams hold.

    Args:
        strategy: that trains.
        progress: where the run stands.
    """

    def __init__(self, strategy: HybridDeepSpeedStrategy, progress: Progress) -> None:
        self.strategy = strategy
        self.progress = progress
        self.writer = CheckpointWriter(
            asynchronous=strategy.checkpoint_config.asynchronous, timeout=seconds(strategy._timeout)
        )
        self._fingerprints: dict[str, dict[str, str]] = {}
        self.owned: set[str] = set()

    # ---- writing -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; all ranks call it.

        Args:
            folder: the checkpoint's; rank 0's counts.
            state: what ``Trainer`` dumped.

        Raises:
            CheckpointError: on every rank where it failed on one.
        """
        if self.progress.repeats_steps:
            rank_zero_warn(
                f"checkpoint '{folder}' is written in the middle of a step, after optimizer steps that a resumed run "
                "takes again: save where a training step has ended"
            )
        target, residency = Path(self.strategy.broadcast(folder)), self.strategy.residency
        state = {**state, "hybrid_deepspeed": {"guard": self.strategy.guard.state_dict()}}
        residency.enter("train", self._read_by_saving())
        try:
            self.writer.save(target, self._part(self.progress.described(state)))
        finally:
            residency.enter(None)

    def _read_by_saving(self) -> list[str]:
        """Engines, and the frozen models that have to be on the device for it: not those whose fingerprint is known."""
        by_value = self.strategy.checkpoint_config.frozen_models == VALUE
        unknown = [name for name in self.strategy.frozen if by_value or name not in self._fingerprints]
        return [*self.strategy.engines, *unknown]

    def close(self) -> None:
        """Wait for a checkpoint that is being written; after an exception without the other ranks, and not for long.

        Raises:
            CheckpointError: on every rank where it could not be written.
        """
        trainer = self.progress.trainer
        if trainer.state.status == TrainerStatus.INTERRUPTED:
            self.writer.abandon(GRACE_SECONDS)
        else:
            self.writer.wait()

    def _part(self, state: dict[str, Any]) -> Part:
        rank = torch.distributed.get_rank()
        tensors, files = self._of_engines(rank)
        positions = self.progress.positions()
        streams = {f"{i}/{key}": v for i, position in enumerate(positions) for key, v in position.tensors().items()}
        tensors.append(TensorFile(rank_file("streams", rank), streams))
        frozen: dict[str, str | dict[str, str]] = {}
        for name, module in self._frozen().items():
            if self._by_value(name, module):
                tensors.append(TensorFile(rank_file(f"frozen/{name}", rank), *frozen_tensors(module)))
                frozen[name] = VALUE
            else:
                frozen[name] = self._fingerprint(name, module)
        files[LIGHTNING] = _content(state)
        facts = self._facts(state) | {"loaders": len(positions), "frozen": frozen}
        return Part(tensors, files if rank == 0 else {}, facts)

    def _of_engines(self, rank: int) -> tuple[list[TensorFile], dict[str, bytes]]:
        tensors, files = [], {}
        for name, engine in self.strategy.engines.items():
            kept = engine_state(engine)
            tensors.append(TensorFile(rank_file(engine_folder(name), rank), kept.tensors, kept.starts))
            tensors.append(TensorFile(rank_file(engine_folder(name), rank, "buffers"), kept.buffers))
            files[f"{engine_folder(name)}/engine.json"] = _json(merged_numbers(of_all_ranks(kept.summary)))
        return tensors, files

    def _facts(self, state: Mapping[str, Any]) -> dict[str, Any]:
        strategy = self.strategy
        return {
            "global_step": state["global_step"],
            "epoch": state["epoch"],
            "ranks": torch.distributed.get_world_size(),
            "stage": strategy.stage,
            "precision": strategy.precision_plugin.precision,
            "engines": sorted(strategy.engines),
            "config": strategy.run_config,
            "metrics": last_metrics(self.progress.trainer),
        }

    def _frozen(self) -> dict[str, nn.Module]:
        """Everything that holds weights which nothing trains, by name: frozen models, and bases under adapters."""
        module = self.strategy.lightning_module
        assert module is not None
        trained = {name: engine.module for name, engine in self.strategy.engines.items()}
        frozen = {name: module.get_submodule(name) for name in self.strategy.frozen}
        return {name or "module": m for name, m in (trained | frozen).items() if frozen_parameters(m)}

    def _by_value(self, name: str, module: nn.Module) -> bool:
        """Whether to keep frozen weights in full; always those inside an engine, which a module may move by itself.

        A teacher is moved so. The base under an adapter is not.
        """
        with_adapter = any(hasattr(inner, "peft_config") for inner in module.modules())
        kept_anyway = name not in self.strategy.frozen and not with_adapter
        return kept_anyway or self.strategy.checkpoint_config.frozen_models == VALUE

    def _fingerprint(self, name: str, module: nn.Module) -> dict[str, str]:
        """Taken once: nothing trains them."""
        if name not in self._fingerprints:
            self._fingerprints[name] = fingerprints(module)
        return self._fingerprints[name]

    # ---- reading -----------------------------------------------------------------------------------------------------

    def load(self, folder: str | Path, weights_only: bool) -> dict[str, Any]:
        """Put engines, frozen models, loaders and streams into the state of a checkpoint; all ranks call it.

        Returns:
            Lightning's own state.

        Raises:
            CheckpointError: if it is not what was written, or of another model.
        """
        checkpoint = Checkpoint(folder)
        refuse_other_engines(checkpoint, self.strategy.engines)
        self.owned = {*self.strategy.engines, *self.strategy.frozen, *checkpoint.models}
        self.strategy.residency.wake_all()
        for name, engine in self.strategy.engines.items():
            stretches = checkpoint.stretches(engine_folder(name))
            restore_engine(engine, stretches, checkpoint.buffers(name), checkpoint.summary(name))
        self._restore_frozen(checkpoint)
        self._say_what_cannot_be_identical(checkpoint)
        self.strategy.residency.enter(None)
        self.progress.resume_at(checkpoint.positions())
        state = checkpoint.lightning_state(weights_only)
        self.strategy.guard.load_state_dict(state["hybrid_deepspeed"]["guard"])
        return state

    def _restore_frozen(self, checkpoint: Checkpoint) -> None:
        mine = self._frozen()
        for name, saved in checkpoint.manifest["frozen"].items():
            if name not in mine:
                raise CheckpointError(
                    f"checkpoint '{checkpoint.folder}' has a frozen model {name!r}; this run has {sorted(mine)}"
                )
            if saved == VALUE:
                restore_frozen(mine[name], checkpoint.stretches(f"frozen/{name}"))
            else:
                refuse_other_weights(name, mine[name], saved)

    def _say_what_cannot_be_identical(self, checkpoint: Checkpoint) -> None:
        before, now = checkpoint.manifest["config"], self.strategy.run_config
        changed = differences(before, now) if before and now else []
        if changed:
            notice("the configuration is not the one that the checkpoint was written with:\n  " + "\n  ".join(changed))
        ranks, stage = torch.distributed.get_world_size(), self.strategy.stage
        said, here = checkpoint.manifest["ranks"], checkpoint.manifest["stage"]
        if said != ranks:
            notice(
                f"the checkpoint was written by {said} ranks and goes on with {ranks}: weights and optimizer state "
                "are the same; random streams begin anew, sums over ranks round differently, and the order of the data "
                f"is kept only if batch_size is changed so that {ranks} ranks take as much per step as {said} did"
            )
        if here != stage:
            notice(
                f"the checkpoint was written at ZeRO stage {here} and goes on at {stage}: weights and optimizer state "
                "are the same, and sums may round differently"
            )


def state_outside_engines(module: nn.Module, owned: Iterable[str]) -> dict[str, Any]:
    """The state dict of ``module`` less everything inside the submodules named in ``owned``."""
    names = list(owned)
    if "" in names:
        return {}
    prefixes = tuple(f"{name}." for name in names)
    return {key: value for key, value in module.state_dict().items() if not (prefixes and key.startswith(prefixes))}


def load_outside_engines(module: nn.Module, state: Mapping[str, Any], owned: Iterable[str], *, strict: bool) -> None:
    """Load what :func:`state_outside_engines` gave.

    Args:
        module: to load into.
        state: of a checkpoint.
        owned: names of the submodules whose weights are not in it.
        strict: refuse a state of another module, before anything is loaded.

    Raises:
        CheckpointError: names what is missing, and what the module does not know.
    """
    missing = sorted(state_outside_engines(module, owned).keys() - state.keys())
    unknown = sorted(state.keys() - module.state_dict().keys())
    if strict and (missing or unknown):
        raise CheckpointError(
            f"the checkpoint is of another module: of what is outside all engines it lacks {missing or 'nothing'}, and "
            f"has {unknown or 'nothing'} beside; set strict_loading = False on the module to load what both have"
        )
    module.load_state_dict(state, strict=False)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _content(state: dict[str, Any]) -> bytes:
    """Lightning's state as it is now, whatever training does to it later."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
