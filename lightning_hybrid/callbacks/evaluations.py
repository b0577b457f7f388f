"""What the policy said to held-out prompts, and what the reference said, kept while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_hybrid.callbacks.samples import SampleLog
from lightning_hybrid.errors import ConfigError


class EvaluationLog(SampleLog):
    """Write the greedy responses of each evaluation to a JSON Lines file, those to the same prompts every time.

    A line is ``{"step", "index", "prompt", "response", "score", "mean_score", "reference_response",
    "reference_score"}``: ``step`` counts finished iterations, ``index`` is the prompt's place in the held-out data,
    ``mean_score`` that of its sampled responses, and the last two are null without a reference. Global rank 0 writes. A
    run that goes on from a checkpoint drops what was written after it.

    Args:
        path: the file; its folder is made where it is missing.
        rows: prompts in an entry, the first ones of the held-out data.

    Raises:
        ConfigError: if ``rows`` is below 1, or, in validation, if the module keeps no judgements.
    """

    def __init__(self, path: str | Path, rows: int = 32) -> None:
        super().__init__(path, rows=rows)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing: those are the samples of training."""

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write an entry."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for judged in self._judged(pl_module):
                file.write(json.dumps({"step": trainer.global_step, **judged}, ensure_ascii=False) + "\n")

    def _judged(self, pl_module: Any) -> list[dict[str, Any]]:
        """The first rows of the module's last evaluation."""
        if not hasattr(pl_module, "evaluation"):
            raise ConfigError(
                f"EvaluationLog writes down judged responses, and {type(pl_module).__name__} keeps none in "
                "evaluation.judgements: use it with PPOModule"
            )
        return [
            {
                "index": judgement.index,
                "prompt": judgement.prompt,
                "response": judgement.response,
                "score": judgement.score,
                "mean_score": sum(judgement.scores) / len(judgement.scores),
                "reference_response": judgement.reference_response,
                "reference_score": judgement.reference_score,
            }
            for judgement in pl_module.evaluation.judgements[: self.rows]
        ]
