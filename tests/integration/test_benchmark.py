"""The benchmark of generation, at a size at which it measures nothing: it runs, and leaves nobody out in silence."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.integration.processes import ROOT, Ended, run

PEERS = ("native", "HF generate", "HybridEngineRollout", "generate_batch", "TRL GRPO rollout", "vLLM")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Where it ran, and how it ended."""
    folder = tmp_path_factory.mktemp("benchmark")
    size = ["--shape", "tiny", "--sizes", "4x8", "--step-size", "4x8", "--per-prompt", "2"]
    few = ["--rounds", "1", "--steps", "1", "--png", folder / "bars.png"]
    return folder, run([sys.executable, ROOT / "recipes" / "benchmark.py", "all", *size, *few], folder, timeout=90)


def test_every_peer_is_measured_or_named_as_absent(finished: tuple[Path, Ended]) -> None:
    _, ended = finished
    assert ended.code == 0, ended
    table, _, _ = ended.out.partition("one step on")
    for peer in PEERS:
        assert re.search(rf"^{peer} +[\d,]+ |^{peer}: absent: ", table, re.MULTILINE), f"{peer}\n{ended}"


def test_a_whole_step_is_measured_beside_trl_or_trl_is_absent(finished: tuple[Path, Ended]) -> None:
    _, ended = finished
    _, _, table = ended.out.partition("one step on")
    assert re.search(r"^PPO step +\d+\.\d{3} ", table, re.MULTILINE), ended
    assert re.search(r"^TRL GRPO step +\d+\.\d{3} |^TRL GRPO step: absent: ", table, re.MULTILINE), ended


def test_the_figures_are_drawn(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    assert (folder / "bars.png").read_bytes().startswith(b"\x89PNG")
