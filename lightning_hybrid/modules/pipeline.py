"""Responses are asked for one iteration ahead, and learned from before the weights that drew them are too old."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from typing_extensions import override

from lightning_hybrid.algorithms import OnlineConfig
from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.config.sampling import problem_with_staleness
from lightning_hybrid.data.checking import notice
from lightning_hybrid.engines.agreement import of_all_ranks, on_every_rank
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.modules.sampling import Drawn, draw_seed
from lightning_hybrid.rollout import PipelinedBackend, PromptRequest, RolloutBackend
from lightning_hybrid.strategy.progress import upcoming_batch

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


@dataclass(frozen=True)
class Row:
    """A prompt of the data: token ids, text, and its other columns."""

    ids: list[int]
    text: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Pending:
    """A prompt whose responses were asked for and not taken yet.

    Attributes:
        key: of its request.
        step: the iteration whose batch it is in.
        place: of it in the batches of all ranks together.
        row: the prompt.
        stands_in: for the prompt that the data has at this place, which was learned from before a resume.
    """

    key: int
    step: int
    place: int
    row: Row
    stands_in: bool


class Pipeline:
    """What of the prompts is in flight while a rank trains, and which of them an iteration learns from.

    An iteration gives the engines the weights of now, asks for responses to the batch after its own, and takes as many
    prompts as its own has: first those that may not wait for another weight update, then those whose responses are
    finished first. With a staleness of 1 these are its own batch's, drawn while the iteration before it trained
    (Noukhovitch et al. 2024, "Asynchronous RLHF", arXiv:2410.18252). With more, prompts of the next batch whose
    responses are short take the place of some whose responses are long, which are carried over.

    Tokens of older weights are weighed by how much more probable the weights of now find them, and old log-probs are
    those of now: the decoupled objective of Fu et al. 2025, "AReaL", arXiv:2505.24298.

    Every rank takes as many prompts as its batch has, and the last iteration of an epoch asks for no more, so that
    none is left then: each prompt is learned from once. A checkpoint keeps what is carried over as prompts; a run that
    goes on from it lets them stand in for those that were taken before their turn.

    Args:
        module: that trains.

    Attributes:
        version: of the weights of now.
        waited: seconds that the last iteration waited for responses.

    Raises:
        ConfigError: if the backend cannot generate beside training.
    """

    def __init__(self, module: PPOModule) -> None:
        self.module = module
        self.bound = module.rollout_config.max_staleness
        self.backend = _beside_training(module.backend, self.bound)
        self.version = 0
        self.waited = 0.0
        self._pending: dict[int, Pending] = {}
        self._keys = 0
        self._submitted = (-1, 0)  # the last iteration whose batch was, and the places in that batch
        self._stand_ins: dict[int, Row] = {}  # by place, counted on from the next batch that is submitted
        self._kept: dict[int, Row] = {}

    # ---- an iteration ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw(self, batch: Mapping[str, Any]) -> Drawn:
        """Responses to learn from in this iteration; all ranks call it.

        Args:
            batch: of the iteration, see :class:`~lightning_hybrid.data.PromptDataModule`.

        Raises:
            RolloutError: on every rank, where responses could not be had on one.
        """
        module = self.module
        engine = module._engine("actor")
        engine.eval()
        self.version = on_every_rank(lambda: self.backend.update(engine), "the weight update", RolloutError)
        last = module.trainer.max_steps == module.global_step + 1
        upcoming = None if last else upcoming_batch(module.trainer)
        on_every_rank(lambda: self._ask_for(batch, upcoming), "the rollout", RolloutError)
        chosen = on_every_rank(lambda: self._chosen(len(batch["prompt_ids"])), "the rollout", RolloutError)
        return on_every_rank(lambda: self._drawn(chosen), "the rollout", RolloutError)

    def _ask_for(self, batch: Mapping[str, Any], upcoming: Mapping[str, Any] | None) -> None:
        """Submit what is not in flight yet: the iteration's own batch only where none came before it."""
        for step, asked in enumerate((batch, upcoming), start=self.module.global_step):
            if asked is not None and step > self._submitted[0]:
                self._submit(step, asked)

    def _drawn(self, chosen: Sequence[Pending]) -> Drawn:
        rollout = self.backend.take([pending.key for pending in chosen], self.module.config.group_size)
        rows = [pending.row for pending in chosen]
        names = dict.fromkeys(name for row in rows for name in row.fields)
        columns = {name: [row.fields.get(name) for row in rows] for name in names}
        return Drawn(rollout, [row.text for row in rows], columns)

    def _submit(self, step: int, batch: Mapping[str, Any]) -> None:
        """Ask for responses to an iteration's prompts."""
        rows, ranks = rows_of(batch), self.module.trainer.world_size
        places = range(self.module.global_rank, len(rows) * ranks, ranks)
        new = [
            Pending(self._keys + number, step, place, self._stand_ins.get(place, row), place in self._stand_ins)
            for number, (place, row) in enumerate(zip(places, rows, strict=True))
        ]
        self._keys += len(rows)
        self._submitted = (step, len(rows) * ranks)
        self._stand_ins = _moved(self._stand_ins, -len(rows) * ranks)
        self._pending |= {pending.key: pending for pending in new}
        seed, size = draw_seed(self.module, step), self.module.config.group_size
        self.backend.submit([PromptRequest(p.key, p.row.ids, p.place, seed) for p in new], size)

    def _chosen(self, count: int) -> list[Pending]:
        """Wait until ``count`` prompts have their responses, and let go of them; in the order of the data.

        No more are due than are taken: before the iteration submits, as many are pending as its batch has. Every rank
        waits twice, also for nothing.
        """
        begin, last_due = time.perf_counter(), self.module.global_step + 1 - self.bound
        due = [key for key, pending in self._pending.items() if pending.step <= last_due]
        self.backend.wait(due, len(due))
        others, missing = self._pending.keys() - set(due), count - len(due)
        first = self.backend.wait(others, missing)[:missing]
        self.waited = time.perf_counter() - begin
        chosen = [self._pending.pop(key) for key in (*due, *first)]
        return sorted(chosen, key=lambda pending: (pending.step, pending.place))

    @property
    def carried_over(self) -> list[Pending]:
        """This rank's prompts that the iteration had in flight and left to a later one, without those of the next."""
        return [pending for pending in self._pending.values() if pending.step <= self.module.global_step]

    # ---- state -------------------------------------------------------------------------------------------------------

    def end_iteration(self) -> None:
        """What a checkpoint keeps from now on; one written before is of the iteration's start. All ranks call it."""
        self._kept = {place: row for kept in of_all_ranks(self._to_keep()) for place, row in kept.items()}

    def _to_keep(self) -> dict[int, Row]:
        """Prompts by the places that they take in the next batch: of those taken early, or where they are already."""
        step, places = self._submitted
        if step == self.module.global_step:  # nothing is in flight
            return self._stand_ins
        ahead = {pending.place: pending for pending in self._pending.values() if pending.step == step}
        own = range(self.module.global_rank, places, self.module.trainer.world_size)
        taken_early = [place for place in own if place not in ahead]
        carried = [pending.row for pending in self.carried_over]
        kept = dict(zip(taken_early, carried, strict=True)) | _moved(self._stand_ins, places)
        return kept | {place: pending.row for place, pending in ahead.items() if pending.stands_in}

    def end_epoch(self) -> None:
        """Let go of what is in flight where an epoch was left before its end; all ranks call it."""
        left = sum(of_all_ranks(len(self._pending)))
        self._pending, self._submitted = {}, (-1, 0)
        if left:
            notice(
                f"rollout.max_staleness={self.bound}: the epoch was left before its end, and the {left} prompts whose "
                "responses were in flight were never learned from; a run that goes on from its last checkpoint does so"
            )

    def state_dict(self) -> list[dict[str, Any]]:
        """Prompts of all ranks that a checkpoint keeps, and the places that they take; equal on all ranks."""
        return [{"place": place, **asdict(row)} for place, row in sorted(self._kept.items())]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on with the prompts of a checkpoint, written by whatever number of ranks."""
        self._stand_ins = {kept["place"]: Row(kept["ids"], kept["text"], kept["fields"]) for kept in state}
        self._kept = dict(self._stand_ins)


def make_pipeline(module: PPOModule) -> Pipeline | None:
    """A pipeline for a run that begins; None where generation and training take turns."""
    return Pipeline(module) if module.rollout_config.max_staleness else None


class EndPipeline(L.Callback):
    """Let go of what is in flight where an epoch is left early, and of the engines where training fails.

    Lightning does not tear a module down then.
    """

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.pipeline is not None:
            pl_module.pipeline.end_epoch()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(pl_module.backend, PipelinedBackend):
            pl_module.backend.close()


def rows_of(batch: Mapping[str, Any]) -> list[Row]:
    """The prompts of a batch one by one."""
    columns = batch.get("fields", {})
    pairs = zip(batch["prompt_ids"], batch["prompts"], strict=True)
    return [
        Row(list(ids), text, {name: values[place] for name, values in columns.items()})
        for place, (ids, text) in enumerate(pairs)
    ]


def refuse_staleness(config: OnlineConfig, rollout: RolloutConfig) -> None:
    """Raise a `ConfigError` where an algorithm cannot learn from responses that are as old as a rollout's may be."""
    problem = problem_with_staleness(config, rollout)
    if problem is not None:
        raise ConfigError(str(problem))


def _beside_training(backend: RolloutBackend, bound: int) -> PipelinedBackend:
    if isinstance(backend, PipelinedBackend):
        return backend
    raise ConfigError(
        f"rollout.max_staleness = {bound}: {type(backend).__name__} cannot generate beside training; use "
        "rollout.backend=vllm with rollout.vllm.colocate=false, or 0"
    )


def _moved(rows: Mapping[int, Row], by: int) -> dict[int, Row]:
    """The same rows at places counted from another one, less those before it."""
    return {place + by: row for place, row in rows.items() if place + by >= 0}
