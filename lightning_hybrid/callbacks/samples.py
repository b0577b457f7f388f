"""What the policy wrote, kept while it trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_hybrid.callbacks.sample_tables import log_table, terminal_table
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.modules.text import decode_responses


class SampleLog(L.Callback):
    """Write sampled responses to a JSON Lines file: one ``{"step", "prompt", "response", "score"}`` per line.

    ``step`` counts finished iterations, and ``score`` is the reward's own number. The first iteration is logged, and
    every ``every``-th after it, by global rank 0 only. TensorBoard and Weights & Biases show the same as a table, where
    the Trainer logs to them.

    Args:
        path: the file; its folder is made where it is missing.
        every: iterations from one entry to the next.
        rows: responses in an entry, the first ones of the batch.
        print_every: iterations from one table in the terminal to the next; None prints none.

    Raises:
        ConfigError: if one of the numbers is below 1, or, in training, if the module samples no responses.
    """

    def __init__(self, path: str | Path, every: int = 10, rows: int = 4, *, print_every: int | None = None) -> None:
        if every < 1 or rows < 1:
            raise ConfigError(f"SampleLog needs every >= 1 and rows >= 1, got every={every} and rows={rows}")
        if print_every is not None and print_every < 1:
            raise ConfigError(f"SampleLog needs print_every >= 1, or None, got print_every={print_every}")
        self.path = Path(path)
        self.every = every
        self.rows = rows
        self.print_every = print_every

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new file; where the run goes on from a checkpoint, drop what was written after it."""
        if trainer.is_global_zero and self.path.is_file():
            self._rewind(trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write an entry where one is due, and print one where one is due."""
        done = trainer.global_step - 1
        written = done % self.every == 0
        printed = self.print_every is not None and done % self.print_every == 0
        if not trainer.is_global_zero or not (written or printed):
            return
        samples = self._samples(pl_module)
        if written:
            self._write(trainer, samples)
        if printed:
            _print(trainer, terminal_table(samples, trainer.global_step))

    def _write(self, trainer: L.Trainer, samples: list[dict[str, str | float]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": trainer.global_step, **sample}, ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            log_table(logger, samples, trainer.global_step - 1)  # rows of the log count from 0

    def _rewind(self, step: int) -> None:
        """Keep the entries until ``step``; the last line may have been written in part."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= step] if step else []
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        new.replace(self.path)
        if not kept:
            self.path.unlink()

    def _samples(self, pl_module: Any) -> list[dict[str, str | float]]:
        """The first rows of the module's last rollout."""
        rollout = getattr(pl_module, "last_rollout", None)
        if rollout is None:
            raise ConfigError(
                f"SampleLog writes down sampled responses, and {type(pl_module).__name__} keeps none in last_rollout: "
                "use it with PPOModule"
            )
        prompts = pl_module.tokenizer.batch_decode(rollout.prompts[: self.rows], skip_special_tokens=True)
        responses = decode_responses(pl_module.tokenizer, rollout)[: self.rows]
        scores = pl_module.raw_scores[: self.rows].tolist()
        rows = zip(prompts, responses, scores, strict=True)
        return [{"prompt": prompt, "response": response, "score": score} for prompt, response, score in rows]


def _print(trainer: L.Trainer, table: str) -> None:
    """Above the progress bar, where there is one."""
    bar = trainer.progress_bar_callback
    if bar is None:
        sys.stdout.write(f"{table}\n")
    else:
        bar.print(table)
