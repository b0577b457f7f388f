"""What the runs of a sweep are ranked by: one metric of each, and which end of it is better."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from lightning_hybrid.config.validate import validate
from lightning_hybrid.settings import Settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

USUAL_METRICS = ("val/score", "reward/score", "val/accuracy", "val/rewards/accuracy", "val/loss", "loss")
"""What a run is judged by where nothing else is asked for: the first of these that it logs."""
_SHARE = 10


def larger_is_better(metric: str) -> bool:
    """Whether high values of a metric are the good ones, by its name: not those of a loss or a perplexity."""
    return not any(name in metric for name in ("loss", "perplexity"))


class SweepConfig(Settings):
    """How a run is summed up in one number."""

    metric: str | None = None
    """a metric that is logged, such as val/loss; null: the first of USUAL_METRICS"""
    direction: Literal["maximize", "minimize"] | None = None
    """which values are better; null: low ones of a loss, high ones of anything else"""
    value: Literal["last", "best"] = "last"
    """of a run: the mean over the last tenth of the metric's values, which evens out noise, or the best of them"""

    def choose(self, logged: Collection[str]) -> str | None:
        """The metric to rank by among those that were logged; None where it is not there."""
        wanted = USUAL_METRICS if self.metric is None else (self.metric,)
        return next((name for name in wanted if name in logged), None)

    def maximizes(self, metric: str) -> bool:
        """Whether higher values are better."""
        return larger_is_better(metric) if self.direction is None else self.direction == "maximize"

    def judge(self, metric: str, values: Sequence[float]) -> float | None:
        """The number that stands for a run whose metric had these values; None where none of them is finite.

        Diverging is no success: with `last`, a run that ended in NaN has no number.
        """
        if self.value == "best":
            finite = [value for value in values if math.isfinite(value)]
            best = max if self.maximizes(metric) else min
            return best(finite, default=None)
        last = values[-max(1, len(values) // _SHARE) :]
        mean = math.fsum(last) / len(last) if last else math.nan
        return mean if math.isfinite(mean) else None


def ranking_of(config: DictConfig) -> SweepConfig:
    """The group `sweep` of a composed configuration; the defaults for a recipe without one.

    Raises:
        ConfigError: when it is not valid.
    """
    return validate(SweepConfig, config.get("sweep") or {})
