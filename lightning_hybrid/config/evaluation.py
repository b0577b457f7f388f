"""How a policy is judged on held-out prompts while it trains."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings


def _no_more_than_are_sampled(config: EvaluationConfig) -> Problem | None:
    if config.k is None or config.k <= config.samples:
        return None
    return Problem("k", f"must not exceed samples ({config.samples}), out of which k are chosen", str(config.k))


class EvaluationConfig(Settings):
    """Evaluation on held-out prompts; `trainer.val_check_interval` says when, `data.validation_*` on what."""

    rules: ClassVar[tuple[Rule, ...]] = (_no_more_than_are_sampled,)

    samples: PositiveInt = 4
    """responses sampled to each prompt, beside the greedy one; always with the same random streams"""
    k: PositiveInt | None = None
    """the k of val/best_of_<k> and val/pass@<k>, at most samples; null: samples"""
    pass_threshold: float | None = None
    """a response with at least this score passes, for val/pass@1 and val/pass@<k>; null: neither is logged"""

    @property
    def best_of(self) -> int:
        """The k of best of k and pass@k."""
        return self.samples if self.k is None else self.k
