"""The optimization steps of one iteration."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.algorithms import PPOConfig
from lightning_hybrid.engines import backward, discard_gradients
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.modules.batching import micro_batches, minibatches
from lightning_hybrid.modules.experience import Experience
from lightning_hybrid.modules.terms import policy_terms, value_terms
from lightning_hybrid.rl import logprob_gap

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule
    from lightning_hybrid.strategy import HybridDeepSpeedStrategy


class PPOUpdate:
    """Train the actor, and the critic where there is one, on one iteration's experience.

    The loss of a minibatch is an average over all its tokens (or sequences) on all ranks, however it is cut into
    micro-batches and over however many ranks it is spread: the gradient does not depend on either.

    Args:
        module: whose actor and critic to train.
        strategy: whose engines hold them.

    Attributes:
        gap: of old log-probs to those of the first minibatch's forward pass, which ran with the very weights that
            sampled; this rank's sums, see :func:`~lightning_hybrid.rl.logprob_gap`.
    """

    def __init__(self, module: PPOModule, strategy: HybridDeepSpeedStrategy) -> None:
        self.module = module
        self.config = module.config
        self.strategy = strategy
        self.world_size = strategy.world_size
        self.engines = {name: strategy.engines[name] for name in module.trained}
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.gap: dict[str, Tensor] = {}
        self._minibatches = self._planned_before = 0

    def run(self, experience: Experience) -> dict[str, float]:
        """Take ``epochs × minibatches`` steps, fewer if the policy moves beyond ``early_stop_kl``.

        Returns:
            Metrics, each a mean over the minibatches that all engines stepped on (``ratio_max``: the largest), or NaN
            where there was none; ``nonfinite_steps``, the steps that the run has skipped; equal on all ranks.
        """
        size = self._local_minibatch(len(experience))
        self._planned_before = self.module.global_step * self.config.epochs * (len(experience) // size)
        for engine in self.engines.values():
            engine.train()
        for epoch in range(self.config.epochs):
            for rows in minibatches(len(experience), size, self._generator(epoch)):
                if not self._step(experience, rows):
                    return self._summary(epochs=epoch + 1, stopped_early=1.0)
        return self._summary(epochs=self.config.epochs, stopped_early=0.0)

    def _local_minibatch(self, rows: int) -> int:
        wanted = self.config.minibatch_size
        if wanted is None:
            return rows
        if wanted % self.world_size or rows % (wanted // self.world_size):
            raise ConfigError(
                f"algorithm.minibatch_size={wanted} over {self.world_size} ranks does not divide a rollout of {rows} "
                f"sequences per rank: choose a multiple of {self.world_size} that divides {rows * self.world_size}"
            )
        return wanted // self.world_size

    def _generator(self, epoch: int) -> torch.Generator:
        module = self.module
        return torch.Generator().manual_seed(hash((module.seed, module.global_step, epoch)) % 2**63)

    def _step(self, experience: Experience, rows: Tensor) -> bool:
        """Accumulate a minibatch's gradients and step the engines; False if the policy moved too far already."""
        metrics = self._over_ranks(self._gradients(experience, rows), experience.mask[rows].sum())
        too_far = self.config.early_stop_kl is not None and metrics["approx_kl"] > self.config.early_stop_kl
        stepped = self._apply("actor", not too_far and not self._actor_is_waiting())
        if self.module.critic is not None:
            stepped &= self._apply("critic", not too_far)
        counts = stepped and all(map(math.isfinite, metrics.values()))
        for name, value in metrics.items():
            self.metrics[name] += [value] if counts else []
        self._minibatches += 1
        return not too_far

    def _gradients(self, experience: Experience, rows: Tensor) -> dict[str, Tensor]:
        """Accumulate a minibatch's gradients; sums over this rank's tokens of what is logged."""
        sums: dict[str, Tensor] = {}
        denominator = self._denominator(experience.mask[rows])
        for index in micro_batches(experience.attention_mask[rows], self.config.micro_batch_size):
            part = experience.rows(rows[index])
            _accumulate(sums, self._train_actor(part, denominator))
            if self.module.critic is not None:
                loss, figures = value_terms(self.module, part, denominator)
                backward(loss, [self.engines["critic"]])
                _accumulate(sums, figures)
        if self.module.ptx is not None:
            loss = self.module.ptx.loss(self.module, self._planned_before + self._minibatches)
            backward(self.config.ptx_coef * loss, [self.engines["actor"]])
            sums["ptx_loss"] = loss.detach()
        return sums

    def _train_actor(self, part: Experience, denominator: Tensor) -> dict[str, Tensor]:
        loss, logprobs, figures = policy_terms(self.module, part, denominator)
        if self._minibatches == 0:  # the first minibatch: no step has been taken
            _accumulate(self.gap, logprob_gap(logprobs, part.old_logprobs, part.mask))
        backward(loss, [self.engines["actor"]])
        return figures

    def _actor_is_waiting(self) -> bool:
        return isinstance(self.config, PPOConfig) and self.module.global_step < self.config.critic_warmup_steps

    def _apply(self, name: str, keep: bool) -> bool:
        """Step an engine, or drop its gradients; False only if they had to be dropped because they are not finite."""
        engine = self.engines[name]
        if not keep:
            discard_gradients(engine)
            return True
        taken = self.strategy.guard.step(name, engine, at=self.module.global_step)
        self.module.optimizer_steps += 1 if taken and name == "actor" else 0
        return taken

    def _denominator(self, mask: Tensor) -> Tensor:
        """Tokens (or sequences) of the minibatch over all ranks, per rank: engines average gradients over ranks."""
        count = mask.sum() if self.config.aggregation == "token_mean" else mask.any(1).sum()
        return self.module.sum_over_ranks(count.float()) / self.world_size

    def _over_ranks(self, sums: dict[str, Tensor], tokens: Tensor) -> dict[str, float]:
        """Global means from this rank's sums; one reduction for all of them."""
        largest = self.strategy.reduce(sums.pop("ratio_max").clone(), reduce_op="max")
        names = list(sums)
        stacked = torch.stack([*(sums[name].float() for name in names), tokens.float()])
        *totals, count = self.module.sum_over_ranks(stacked).tolist()
        # Losses are already averages of the minibatch, scaled for engines that average over ranks.
        per = {name: self.world_size if name.endswith("loss") else max(count, 1.0) for name in names}
        return {"ratio_max": float(largest)} | {
            name: total / per[name] for name, total in zip(names, totals, strict=True)
        }

    def _summary(self, epochs: float, stopped_early: float) -> dict[str, float]:
        mean = {name: sum(values) / len(values) if values else math.nan for name, values in self.metrics.items()}
        largest = max(self.metrics["ratio_max"], default=math.nan)
        skipped = float(self.strategy.guard.total)
        counts = {"epochs": epochs, "stopped_early": stopped_early, "nonfinite_steps": skipped}
        return mean | {"ratio_max": largest} | counts


def _accumulate(sums: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Add up sums, and keep the largest of the maxima."""
    for name, value in new.items():
        if name not in sums:
            sums[name] = value
        else:
            sums[name] = torch.maximum(sums[name], value) if name.endswith("_max") else sums[name] + value
