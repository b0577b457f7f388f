"""A long run takes no more memory, files or threads in its second half than in its first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.faults import soak
from tests.integration.processes import run

STEPS, EVERY = 1000, 50
HOUR = 3600.0


@pytest.mark.slow
def test_a_thousand_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = run([sys.executable, soak.__file__, tmp_path, str(STEPS), str(EVERY)], tmp_path, HOUR, OMP_NUM_THREADS="1")
    assert ended.code == 0, ended
    measured = json.loads((tmp_path / "soak.json").read_text())
    with capsys.disabled():
        print("\n" + "\n".join(report(measured)))
    late = measured["samples"][len(measured["samples"]) // 2 :]
    resident = [sample["resident"] for sample in late]
    assert max(resident) <= 1.01 * min(resident)
    assert len({sample["files"] for sample in late}) == 1
    assert len({sample["threads"] for sample in late}) == 1


def report(measured: dict[str, Any]) -> list[str]:
    samples = measured["samples"]
    halves = {"first": samples[: len(samples) // 2], "second": samples[len(samples) // 2 :]}
    lines = [f"{'half':<8}{'MiB, least':>12}{'MiB, most':>12}{'files':>8}{'threads':>9}{'s/step, median':>16}"]
    for name, half in halves.items():
        mib = [sample["resident"] / 2**20 for sample in half]
        files, threads = ("/".join(map(str, sorted({s[k] for s in half}))) for k in ("files", "threads"))
        seconds = median(sample["seconds"] for sample in half)
        lines.append(f"{name:<8}{min(mib):>12.1f}{max(mib):>12.1f}{files:>8}{threads:>9}{seconds:>16.4f}")
    share = measured["saving"] / measured["seconds"]
    saves, seconds = STEPS // EVERY, measured["seconds"]
    lines.append(f"{saves} checkpoints took {measured['saving']:.1f} of {seconds:.1f} s ({share:.2%})")
    return lines
