"""Evaluation while training: held-out prompts, greedy and sampled, against the reference; nothing of it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_hybrid.config import EvaluationConfig
from lightning_hybrid.engines.agreement import of_all_ranks, on_every_rank
from lightning_hybrid.errors import RolloutError, ServerError
from lightning_hybrid.models.adapters import AdaptersOff
from lightning_hybrid.modules.experience import reference_logprobs
from lightning_hybrid.modules.judgement import Judgement, figures_of
from lightning_hybrid.modules.needs import remedies
from lightning_hybrid.modules.passes import policy_logprobs
from lightning_hybrid.modules.reference import ServedReference
from lightning_hybrid.modules.scoring import reward_scores
from lightning_hybrid.modules.text import decode_responses
from lightning_hybrid.rl import estimate_kl
from lightning_hybrid.rollout import Rollout, join

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule

T = TypeVar("T")
Key = tuple[int, tuple[int, ...]]  # place in the data set, token ids of the prompt


class Evaluation:
    """Judge a policy on held-out prompts, a batch at a time, over all ranks.

    To each prompt the policy gives a greedy response, and ``samples`` drawn from the same random streams every time:
    evaluations differ by the weights alone. The reference gives its greedy response once, at the first evaluation of a
    run, also of one that is resumed: its weights never change, so it says the same again.

    Rows that a sampler repeats, so that all ranks have as many, count once where the batch has ``index``, as those of
    :class:`~lightning_hybrid.data.PromptDataModule` have.

    Attributes:
        judgements: of the last evaluation, those of all ranks in the order of the data set.
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self.judgements: list[Judgement] = []
        self._own: list[tuple[Key, Judgement]] = []
        self._of_reference: dict[Key, tuple[str, float]] = {}
        self._begun = 0.0

    def forget(self) -> None:
        """Forget what the reference said: another run begins, perhaps on other data."""
        self._of_reference.clear()

    def begin(self) -> None:
        """Begin an evaluation."""
        self._own = []
        self._begun = time.perf_counter()

    def judge(self, module: PPOModule, batch: dict[str, Any]) -> None:
        """Take in a batch of prompts, see :class:`~lightning_hybrid.data.PromptDataModule`; all ranks call it.

        Raises:
            RewardError: on every rank, where the reward failed on one.
            RolloutError: on every rank, where a response could not be generated on one.
        """
        with isolate_rng():  # a reward may draw from the streams that training goes on with
            keys = self._keys(module, batch)
            judged = self._judged(module, batch, keys)
        if module._residency is not None:
            module._residency.enter(None)  # callbacks may read the trained weights
        self._own += zip(keys, judged, strict=True)

    def conclude(self, module: PPOModule) -> dict[str, float]:
        """Figures over the prompts of all ranks, by the names that they are logged under; all ranks call it."""
        together = {key: judgement for own in of_all_ranks(self._own) for key, judgement in own}
        self._own = []
        self.judgements = [together[key] for key in sorted(together)]
        if not self.judgements:
            return {}
        seconds = time.perf_counter() - self._begun
        return figures_of(self.judgements, self.config) | {"seconds/evaluation": seconds}

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def _keys(self, module: PPOModule, batch: dict[str, Any]) -> list[Key]:
        ids = batch["prompt_ids"]
        # Without an index a prompt's place is where a sampler that deals out in turn took it from.
        first, ranks = len(self._own), module.trainer.world_size
        dealt = [(first + position) * ranks + module.global_rank for position in range(len(ids))]
        return [(place, tuple(prompt)) for place, prompt in zip(batch.get("index", dealt), ids, strict=True)]

    def _judged(self, module: PPOModule, batch: dict[str, Any], keys: list[Key]) -> list[Judgement]:
        count = self.config.samples
        with _phase(module, "rollout", ["actor"]):
            actor = module._engine("actor")
            greedy = _respond(module, actor, keys, greedy=True)
            sampled = _respond(module, actor, keys, n=count)
        with _phase(module, "reward", list(module.reward_models) or None):
            scores = _scores(module, batch, join([greedy, sampled]), [1, count])
            figures = {name: values[len(keys) :] for name, values in module.reward.figures.items()}
        kl = _kl_to_reference(module, sampled)
        said = self._said_by_reference(module, batch, keys)
        texts = decode_responses(module.tokenizer, greedy)
        per_prompt = zip(
            _grouped(scores[len(keys) :].tolist(), count),
            _grouped(sampled.lengths.tolist(), count),
            _grouped(sampled.finished.tolist(), count),
            strict=True,
        )
        return [
            Judgement(
                index=keys[row][0],
                prompt=batch["prompts"][row],
                response=texts[row],
                score=float(scores[row]),
                scores=of_samples,
                lengths=lengths,
                ended=ended,
                figures={name: _grouped(values.tolist(), count)[row] for name, values in figures.items()},
                kl=None if kl is None else _grouped(kl.tolist(), count)[row],
                reference_response=None if said is None else said[row][0],
                reference_score=None if said is None else said[row][1],
            )
            for row, (of_samples, lengths, ended) in enumerate(per_prompt)
        ]

    def _said_by_reference(
        self, module: PPOModule, batch: dict[str, Any], keys: list[Key]
    ) -> list[tuple[str, float]] | None:
        """Text and score of the reference's response to each prompt; None without a reference."""
        if module.reference is None:
            return None
        missing = any(key not in self._of_reference for key in keys)
        # Generating and scoring are the work of all ranks.
        if float(module.sum_over_ranks(torch.tensor(float(missing), device=module.device))):
            greedy = _greedy_of_reference(module, keys)
            with _phase(module, "reward", list(module.reward_models) or None):
                scores = _scores(module, batch, greedy, [1]).tolist()
            texts = decode_responses(module.tokenizer, greedy)
            self._of_reference |= dict(zip(keys, zip(texts, scores, strict=True), strict=True))
        return [self._of_reference[key] for key in keys]


def _phase(module: PPOModule, name: str, runs: list[str] | None) -> AbstractContextManager[None]:
    """A phase of the evaluation, which leaves the figures of training alone."""
    return module.validation_phases(name, module._residency, runs, remedies(module, name))


def _respond(module: PPOModule, engine: Any, keys: list[Key], greedy: bool = False, n: int = 1) -> Rollout:
    """Responses of an engine, or of a bare model, whose random streams depend on seed and place of the prompt only."""
    engine.eval()
    prompts, places = [list(ids) for _, ids in keys], [place for place, _ in keys]
    with torch.no_grad():
        return on_every_rank(
            lambda: module.backend.generate(engine, prompts, seed=module.seed, greedy=greedy, indices=places, n=n),
            "a rollout of the evaluation",
            RolloutError,
        )


def _greedy_of_reference(module: PPOModule, keys: list[Key]) -> Rollout:
    reference = module.reference
    if not isinstance(reference, ServedReference):
        with _reference_generates(module) as (engine, runs), _phase(module, "rollout", runs):
            return _respond(module, engine, keys, greedy=True)
    prompts, places = [list(ids) for _, ids in keys], [place for place, _ in keys]
    with _phase(module, "rollout", None):
        return module.separate.on_every_rank(
            lambda: reference.respond(prompts, module.seed, places, module.device), "the reference", ServerError
        )


@contextmanager
def _reference_generates(module: PPOModule) -> Iterator[tuple[Any, list[str]]]:
    """What generates as the reference, and the names of what it runs: a model of its own, or the actor's base."""
    if isinstance(module.reference, AdaptersOff):
        with module.reference.switched_off():
            yield module._engine("actor"), ["actor"]
    else:
        assert isinstance(module.reference, nn.Module)
        yield module.reference.model, ["reference"]


def _scores(module: PPOModule, batch: dict[str, Any], rollout: Rollout, times: Sequence[int]) -> Tensor:
    """The reward's numbers, ``[rows]`` float32; the rows are the batch's prompts, each so often, once per entry."""

    def spread(values: Sequence[T]) -> list[T]:
        return [value for count in times for value in values for _ in range(count)]

    fields = {name: spread(values) for name, values in batch.get("fields", {}).items()}
    return reward_scores(module, spread(batch["prompts"]), rollout, fields)


@torch.no_grad()
def _kl_to_reference(module: PPOModule, rollout: Rollout) -> Tensor | None:
    """KL of each response to the reference, ``[rows]`` float64, nats, estimated as in training; None without one."""
    if module.reference is None:
        return None
    size, temperature = module.config.micro_batch_size, module.rollout_config.temperature
    runs = ["actor", "reference"] if isinstance(module.reference, nn.Module) else ["actor"]
    with _phase(module, "experience", runs):
        reference = reference_logprobs(module, rollout)
        mine = policy_logprobs(module.actor, rollout, size, temperature)
        other = reference()
        assert other is not None
        kl = estimate_kl(mine, other, module.config.kl_estimator)
        return kl.masked_fill(~rollout.response_mask, 0.0).double().sum(1)


def _grouped(values: Sequence[T], size: int) -> list[tuple[T, ...]]:
    return [tuple(values[begin : begin + size]) for begin in range(0, len(values), size)]
