"""The end of a PPO iteration: what lasts beyond it is adjusted, and what it was like is logged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_hybrid.algorithms import GroupConfig
from lightning_hybrid.modules.experience import Experience
from lightning_hybrid.modules.metrics import (
    backend_metrics,
    mismatch_metrics,
    rollout_metrics,
    staleness_metrics,
    update_metrics,
)
from lightning_hybrid.modules.old_logprobs import LogprobGap
from lightning_hybrid.modules.optimization import step_schedules
from lightning_hybrid.modules.sampling import Samples, say_when_nothing_is_told

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


def conclude(
    module: PPOModule, samples: Samples, experience: Experience, update: dict[str, float], gap: LogprobGap
) -> None:
    """Log an iteration, and adjust what lasts; all ranks call it.

    Args:
        module: that trains.
        samples: of this rank.
        experience: made of them.
        update: figures of the optimization steps.
        gap: of the rollout's log-probs to the training forward's.
    """
    metrics = rollout_metrics(module, samples, experience) | mismatch_metrics(module, gap, experience)
    _say_when_nothing_is_told(module, metrics, len(experience))
    metrics |= module.phases.memory_figures(module.trainer.strategy)  # type: ignore[arg-type]
    _adjust(module, metrics, gap, len(experience))
    metrics |= update_metrics(module, update, samples.rollout) | backend_metrics(module)
    if module.pipeline is not None:
        metrics |= staleness_metrics(module.pipeline, samples.rollout)
        module.pipeline.end_iteration()
    step_schedules(module)
    module.log_dict(metrics, batch_size=len(experience))
    shown = {"score": metrics["reward/score"]}
    shown |= {"kl": metrics["policy/kl"]} if module.reference is not None else {}
    module.log_dict(shown, prog_bar=True, logger=False)


def _say_when_nothing_is_told(module: PPOModule, metrics: dict[str, Any], rows: int) -> None:
    if isinstance(module.config, GroupConfig):
        groups = rows * module.trainer.world_size // module.config.group_size
        alike = metrics["rollout/uninformative_groups"]
        times = say_when_nothing_is_told(module.global_step + 1, groups, alike, module.without_signal)
        module.without_signal = times


def _adjust(module: PPOModule, metrics: dict[str, float], gap: LogprobGap, rows: int) -> None:
    """Take over the moments of the scores; choose where old log-probs come from, and the coefficient of the KL."""
    module.score_moments = module.moments_now
    module.old_logprob_source.judge(gap)
    kl = metrics.get("policy/kl", math.nan)
    if math.isfinite(kl):  # the steps of an iteration that is not were skipped, too
        module.kl_controller.update(kl, rows * module.trainer.world_size)
