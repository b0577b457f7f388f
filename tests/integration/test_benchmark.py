"""The benchmark of generation, at a size at which it measures nothing: it runs, and leaves nobody out in silence."""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
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


@pytest.mark.slow
def test_native_and_vllm_are_measured_inside_ppo_or_vllm_is_absent(tmp_path: Path) -> None:
    size = ["--shape", "llama-4m", "--size", "4x8", "--stages", "3", "--ranks", "2", "--iterations", "1"]
    few = ["--rounds", "1", "--pushes", "1", "--png", tmp_path / "bars.png"]
    ended = run([sys.executable, ROOT / "recipes" / "benchmark.py", "ppo", *size, *few], tmp_path, timeout=600)
    assert ended.code == 0, ended
    assert re.search(r"^ZeRO-3, 2 ranks, native +[\d,]+ +– ", ended.out, re.MULTILINE), ended
    native, vllm = json.loads((tmp_path / "bars.json").read_text())["cells"]
    (iteration,) = native["rounds"][0]["iterations"]
    assert 0 < iteration["tokens"] <= 4 * 8
    assert iteration["rollout"] >= iteration["generate"] > 0
    assert iteration["push"] == iteration["wake"] == iteration["sleep"] == 0
    assert native["rounds"][0]["resident"].keys() == {"rollout", "reward", "experience", "update"}
    assert min(native["rounds"][0]["resident"].values()) > native["rounds"][0]["libraries"]
    if find_spec("vllm") is None:
        assert re.search(r"^ZeRO-3, 2 ranks, vllm: absent: 'import vllm' fails: ", ended.out, re.MULTILINE), ended
        return
    assert vllm["note"] is None, ended
    measured = vllm["rounds"][0]
    assert measured["iterations"][0]["push"] > 0
    assert measured["iterations"][0]["gap_max"] < 1e-4
    assert {push["order"] for push in measured["pushes"]} == {"one pass", "per parameter"}
    # Changed weights arrive in either order, and all of them.
    assert max(push["gap"] for push in measured["pushes"]) < 1e-4
    assert re.search(r"^ZeRO-3, 2 ranks +[\d.]+ +[\d.]+ +[\d.]+ × ", ended.out, re.MULTILINE), ended


def test_responses_that_ranks_cannot_share_evenly_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "recipes" / "benchmark.py", "ppo", "--shape", "tiny", "--size", "5x8"]
    ended = run(command, tmp_path, timeout=90)
    assert ended.code == 1
    assert "5 responses are not shared evenly by each of --ranks [1, 2]" in ended.err
