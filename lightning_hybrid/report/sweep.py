"""What the runs of a sweep came to: a record of each in its folder, and one table and one picture of all."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from typing_extensions import override

from lightning_hybrid.config.sweep import ranking_of
from lightning_hybrid.errors import ConfigError, LightningHybridError
from lightning_hybrid.report.summary import RECORD, metrics_of, write_summary

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig


class SweepSummary(Callback):
    """Hydra's callback that makes one sweep of many jobs; each recipe has it by ``conf/hydra/callbacks/summary.yaml``.

    Each job of ``-m`` gets a folder of its own below the sweep's, also where it names another ``output_dir``, and a
    file ``job.json`` there. What it returns to the sweeper is one number, ``sweep.metric`` of its ``metrics.csv``. A
    job that fails is written down, and the others go on. In the end :func:`write_summary` writes ``summary.csv`` and
    ``summary.png``, and the process ends with code 2 if a job failed. Outside a sweep it does nothing.
    """

    def __init__(self) -> None:
        self._began = 0.0

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hold all jobs to the sweep's folder: each would find one by its own settings, such as its experiment's."""
        folder = str(config.hydra.sweep.dir).replace("\\", "\\\\").replace("'", "\\'")
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{folder}'")

    @override
    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the job's record, which stays as it is where the job is killed."""
        if _is_ours(config):
            self._began = time.time()
            self._write(config, "unfinished")

    @override
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Finish the record, and return the job's number, or None if it failed, in place of an error."""
        from hydra.core.utils import JobStatus

        if not _is_sweep(config):
            return
        value, error = None, None
        try:
            _ = job_return.return_value
            value = _value(config)
        except Exception as raised:  # whatever it is, it is this job's, and must not end the others
            error = str(raised) if isinstance(raised, LightningHybridError) else f"{type(raised).__name__}: {raised}"
            told = f"error: {error}\n" if isinstance(raised, LightningHybridError) else traceback.format_exc()
            sys.stderr.write(told)
        if _is_ours(config):
            self._write(config, "done" if error is None else "failed", error)
        job_return.status, job_return.return_value = JobStatus.COMPLETED, value

    @override
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sum up, and end with code 2 where a job failed."""
        try:
            summary = write_summary(Path(config.hydra.sweep.dir), ranking_of(config))
        except LightningHybridError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
        print(summary)  # noqa: T201
        if summary.failed:
            sys.stderr.write(f"error: {len(summary.failed)} of {len(summary.runs)} runs of the sweep failed\n")
            sys.exit(2)

    def _write(self, config: DictConfig, status: str, error: str | None = None) -> None:
        """Write the record in one step."""
        hydra = config.hydra
        record = {
            "number": hydra.job.num,
            "recipe": hydra.job.config_name,
            "overrides": [*hydra.overrides.task],
            "status": status,
            "seconds": time.time() - self._began,
            "error": error,
        }
        path = Path(hydra.runtime.output_dir) / RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{RECORD}.new")
        new.write_text(json.dumps(record, indent=2), encoding="utf-8")
        new.replace(path)


def _is_sweep(config: DictConfig) -> bool:
    from hydra.types import RunMode

    return bool(config.hydra.mode == RunMode.MULTIRUN)


def _is_ours(config: DictConfig) -> bool:
    """Whether this process writes the record of a sweep's job: SLURM starts one process for each rank."""
    return _is_sweep(config) and int(os.environ.get("SLURM_PROCID", "0")) == 0


def _value(config: DictConfig) -> float | None:
    """The number that stands for the job that has just ended; None where it logged none of the usual metrics."""
    ranking, metrics = ranking_of(config), metrics_of(Path(config.hydra.runtime.output_dir))
    metric = ranking.choose(metrics)
    if metric is None and ranking.metric is not None:
        there = f"there are {', '.join(metrics)}" if metrics else "there is no metrics.csv: use logger=csv"
        raise ConfigError(f"sweep.metric = {ranking.metric}: not logged; {there}")
    return None if metric is None else ranking.judge(metric, metrics[metric][1])
