"""Keep what a report tells of a run, and write it at the end, however that comes."""

from __future__ import annotations

import json
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_hybrid.callbacks import Interrupted
from lightning_hybrid.report.run_page import report_run
from lightning_hybrid.report.runs import FACTS, ROLLOUTS, read_json
from lightning_hybrid.settings import without_credentials

_PACKAGES = (
    "lightning-hybrid",
    "torch",
    "deepspeed",
    "lightning",
    "transformers",
    "peft",
    "hydra-core",
    "triton",
    "vllm",
)
_ENOUGH = 256  # responses of a histogram
_RUNNING = "running, or killed"

Spread = dict[str, list[float]]


class RunReport(L.Callback):
    """Write ``run.json`` when training begins, and again with ``report.html`` when it ends, is interrupted or fails.

    ``run.json`` holds what the other files of a run do not: its stage, configuration, versions and device, how it
    ended, and the seconds in training, written again with each checkpoint, so that a run that goes on in the folder
    adds to them; ``rollouts.json`` lengths, KL (nats) and scores of the responses of the first and the last iterations,
    those of global rank 0. A report that cannot be written is warned of and stops nothing.

    Args:
        folder: of the run.
        stage: what the progress bar calls the run, such as ``"3/3 ppo"``.
        config: all settings of the run, see :func:`~lightning_hybrid.settings.without_credentials`.
    """

    def __init__(self, folder: str | Path, stage: str, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.stage = stage
        self.config = config
        self._seconds = 0.0
        self._begun: float | None = None
        self._first: list[tuple[int, Spread]] = []
        self._last: list[tuple[int, Spread]] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what runs: also a run that is killed leaves its settings."""
        self._begun = time.perf_counter()
        if trainer.is_global_zero:
            self._attempt(lambda: self._begin(goes_on=trainer.ckpt_path is not None))
            self._attempt(lambda: self._write_facts(trainer, _RUNNING))

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Keep what the histograms show."""
        if not trainer.is_global_zero or getattr(pl_module, "last_rollout", None) is None:
            return
        entry = (trainer.global_step, _spread(pl_module))
        if _responses(self._first) < _ENOUGH:
            self._first.append(entry)
        self._last.append(entry)
        while _responses(self._last[1:]) >= _ENOUGH:
            del self._last[0]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the report."""
        self._finish(trainer, "finished")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the report of what there is, once training began."""
        if isinstance(exception, Interrupted | KeyboardInterrupt):
            self._finish(trainer, "interrupted")
        else:
            said = without_credentials((str(exception).splitlines() or [""])[0])
            self._finish(trainer, f"ended by {type(exception).__name__}: {said}"[:300])

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down beside the checkpoint, not in it, how long the run took so far: in it no two runs were alike."""
        if trainer.is_global_zero and self._begun is not None:
            self._attempt(lambda: self._write_facts(trainer, _RUNNING))

    @override
    def state_dict(self) -> dict[str, Any]:
        """What the histograms show."""
        return {"first": self._first, "last": self._last}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._first, self._last = list(state_dict["first"]), list(state_dict["last"])

    def _begin(self, *, goes_on: bool) -> None:
        self._seconds = float(read_json(self.folder / FACTS).get("seconds") or 0.0) if goes_on else 0.0

    def _now(self) -> float:
        """Seconds in training until now, those among them that the folder's run took before it went on."""
        return self._seconds + (0.0 if self._begun is None else time.perf_counter() - self._begun)

    def _finish(self, trainer: L.Trainer, status: str) -> None:
        if self._begun is None:
            return
        self._seconds, self._begun = self._now(), None
        if trainer.is_global_zero:
            self._attempt(lambda: self._report(trainer, status))

    def _report(self, trainer: L.Trainer, status: str) -> None:
        for logger in trainer.loggers:
            logger.save()
        self._write_facts(trainer, status)
        report_run(self.folder)

    def _write_facts(self, trainer: L.Trainer, status: str) -> None:
        steps = trainer.estimated_stepping_batches if trainer.max_steps < 0 else trainer.max_steps
        facts = {
            "stage": self.stage,
            "status": status,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "steps": trainer.global_step,
            "planned_steps": int(steps) if 0 < steps < float("inf") else None,
            "seconds": round(self._now(), 3),
            "device": _device(trainer),
            "versions": {"python": platform.python_version(), **_versions()},
            "config": self.config,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / FACTS, json.dumps(facts, indent=2))
        ends = {"first": _together(self._first), "last": _together(self._last)}
        _replace(self.folder / ROLLOUTS, json.dumps({name: values for name, values in ends.items() if values}))

    def _attempt(self, write: Any) -> None:
        """A report is worth less than what is trained, and than the error that ends a run."""
        try:
            write()
        except Exception as error:
            rank_zero_warn(f"no report in {self.folder}: {type(error).__name__}: {error}")


def _replace(path: Path, text: str) -> None:
    """Write a file in place of another in one step."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _spread(module: Any) -> Spread:
    """Length, KL and score of each response of the module's last rollout."""
    spread = {"length": module.last_rollout.lengths.tolist(), "score": module.raw_scores.tolist()}
    kl = getattr(module, "last_kl", None)
    if kl is not None:
        spread["kl"] = kl.tolist()
    return {name: [round(value, 5) for value in values] for name, values in spread.items()}


def _responses(entries: list[tuple[int, Spread]]) -> int:
    return sum(len(spread["length"]) for _, spread in entries)


def _together(entries: list[tuple[int, Spread]]) -> dict[str, Any]:
    """The steps that the entries are of, and each kind of number of all of them."""
    if not entries:
        return {}
    names = entries[0][1]
    values = {name: [value for _, spread in entries for value in spread.get(name, [])] for name in names}
    return {"steps": [entries[0][0], entries[-1][0]], **values}


def _device(trainer: L.Trainer) -> str:
    root = trainer.strategy.root_device
    name = torch.cuda.get_device_name(root) if root.type == "cuda" else root.type.upper()
    return f"{trainer.world_size} × {name}"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
