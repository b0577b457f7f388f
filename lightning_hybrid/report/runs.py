"""A run as its folder tells it: what was configured, logged and sampled."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_hybrid.errors import DataError
from lightning_hybrid.report.metrics import Metrics, read_metrics
from lightning_hybrid.settings import without_credentials

FACTS = "run.json"
METRICS = "metrics.csv"
SAMPLES = "samples.jsonl"
EVALUATION = "evaluation.jsonl"
ROLLOUTS = "rollouts.json"


@dataclass(frozen=True)
class Sample:
    """A response: after how many steps, to what, what the reward gave it, and the reference's with its score."""

    step: int
    prompt: str
    response: str
    score: float
    reference: tuple[str, float] | None = None


@dataclass(frozen=True)
class RecordedRun:
    """What stands in the folder of a run.

    Attributes:
        folder: of the run.
        metrics: from ``metrics.csv``; empty where nothing was logged there.
        samples: from ``samples.jsonl``, in the order in which they were drawn.
        evaluation: from ``evaluation.jsonl``: greedy responses to held-out prompts, the same ones every time.
        facts: from ``run.json``, see :class:`~lightning_hybrid.report.callback.RunReport`; empty for a run without one.
        rollouts: from ``rollouts.json``: lengths, KL and scores of the ``first`` and the ``last`` responses.
        config: all settings of the run; None where nothing says them.
    """

    folder: Path
    metrics: Metrics = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    evaluation: tuple[Sample, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    rollouts: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    @property
    def recipe(self) -> str:
        """Such as ``"ppo"``: the last word of the stage that was shown, or the folder's name."""
        return str(self.facts.get("stage") or self.folder.resolve().name).split()[-1]


def read_run(folder: str | Path) -> RecordedRun:
    """Read the folder of a run.

    Raises:
        DataError: if it is none, or one of its files is damaged; names the file and the line.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise DataError(_not_a_run(folder))
    facts = read_json(folder / FACTS)
    return RecordedRun(
        folder=folder,
        metrics=read_metrics(folder / METRICS) if (folder / METRICS).is_file() else {},
        samples=tuple(_read_samples(folder / SAMPLES)),
        evaluation=tuple(_read_samples(folder / EVALUATION)),
        facts=facts,
        rollouts=read_json(folder / ROLLOUTS),
        config=facts.get("config") or _composed(folder / ".hydra" / "config.yaml"),
    )


def is_run(folder: Path) -> bool:
    """Whether a run has written to the folder."""
    return any((folder / name).is_file() for name in (FACTS, METRICS))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for no file.

    Raises:
        DataError: if it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object, but {type(values).__name__}")
    return values


def _not_a_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"no run at '{folder}': there is no such folder"
    inside = sorted(str(path.parent) for name in (METRICS, FACTS) for path in folder.glob(f"*/{name}"))
    hint = f"; runs in it: {', '.join(dict.fromkeys(inside))}" if inside else ""
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return f"'{folder}' is not the folder of a run: it holds neither {METRICS} nor {FACTS}, but {found}{hint}"


def _read_samples(path: Path) -> list[Sample]:
    if not path.is_file():
        return []
    # A run that is still going, or was killed, may have written a part of the last line.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [_sample(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _sample(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
        reference = row.get("reference_response")
        return Sample(
            step=int(row["step"]),
            prompt=str(row["prompt"]),
            response=str(row["response"]),
            score=float(row["score"]),
            reference=None if reference is None else (str(reference), float(row["reference_score"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not a sample with step, prompt, response and score: {error!r}") from error


def _composed(path: Path) -> dict[str, Any] | None:
    """What Hydra kept of the command, for runs that wrote no settings of their own."""
    if not path.is_file():
        return None
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return without_credentials(values) if isinstance(values, dict) else None
