"""Folders of runs as a run would leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PPO_METRICS = {
    "reward/score": [0.5 + step / 10 for step in range(20)],
    "policy/kl": [step / 20 for step in range(20)],
    "seconds/rollout": [1.0] * 20,
    "seconds/update": [3.0] * 20,
    "lr": [1e-4] * 20,
}


def write_run(
    folder: Path,
    metrics: Mapping[str, Sequence[float]] | None = None,
    samples: Sequence[tuple[int, str, str, float]] = (),
    **facts: Any,
) -> Path:
    """`metrics` with a value for each step, `samples` of step, prompt, response and score, and `run.json`."""
    folder.mkdir(parents=True)
    columns = PPO_METRICS if metrics is None else metrics
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(["step", *columns]), *(",".join(map(str, [step, *row])) for step, row in enumerate(rows))]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    names = ("step", "prompt", "response", "score")
    if samples:
        texts = [json.dumps(dict(zip(names, sample, strict=True))) for sample in samples]
        (folder / "samples.jsonl").write_text("".join(f"{text}\n" for text in texts))
    (folder / "run.json").write_text(json.dumps({"stage": "ppo", **facts}))
    return folder
