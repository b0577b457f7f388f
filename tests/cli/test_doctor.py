"""`lightning-hybrid doctor`: right about this machine, and about ones that are broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from checkup.combinations import COMBINATIONS, within  # noqa: E402
from checkup.facts import Facts, Package, extension_cache, import_all, variables  # noqa: E402
from checkup.findings import judge  # noqa: E402
from doctor import render  # noqa: E402

FINE = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "transformers": "5.23.0", "lightning": "2.6.6"}
NEEDED = {"torch": "2.11", "deepspeed": "0.19.8", "lightning": "2.6"}


def facts(**changes: Any) -> Facts:
    """A machine on which all is well."""
    well: dict[str, Any] = {
        "python": "3.11.7",
        "packages": {name: Package(version) for name, version in FINE.items()},
        "needed": NEEDED,
        "cores": 8,
        "compilers": {"gcc": "12", "g++": "12", "ninja": "1.13", "nvcc": ""},
        "network": {"hostname": "here", "address": "10.0.0.1", "interfaces": ["lo", "eth0"]},
        "free": {"here": 2**40, "/dev/shm": 2**34},
    }
    return Facts(**(well | changes))


def found(level: str, **changes: Any) -> list[tuple[str, str]]:
    """Problem and remedy of each finding of that level."""
    return [(f.problem, f.remedy) for f in judge(facts(**changes)) if f.level == level]


def with_package(name: str, version: str = "", error: str | None = None) -> dict[str, Any]:
    return {"packages": {**facts().packages, name: Package(version, error)}}


GPU = {"cuda": "13.0", "devices": [{"name": "H200", "free_bytes": 2**37, "total_bytes": 2**37}]}


def test_nothing_is_wrong_with_a_machine_on_which_all_is_well() -> None:
    assert found("stop") == found("warn") == []


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        (with_package("torch", "2.10.1"), "torch 2.10.1 is older than 2.11", 'pip install "torch>=2.11"'),
        (with_package("deepspeed"), "deepspeed is not installed", 'pip install "deepspeed>=0.19.8"'),
        (
            with_package("deepspeed", "0.19.8", "OSError: libcuda"),
            "import of deepspeed fails: OSError",
            "--force-reinstall",
        ),
        ({"python": "3.10.2"}, "Python 3.10.2 is older than 3.11", "3.11 or later"),
        ({"variables": {"DS_ACCELERATOR": "cuda"}}, "torch sees no GPU", "unset DS_ACCELERATOR"),
        ({"variables": {"GLOO_SOCKET_IFNAME": "ib0"}}, "ib0 is no interface; there are: lo, eth0", "unset GLOO_SOCKET"),
        ({"free": {"here": 2**20}}, "0.00 GiB of disk are free (here)", "make room"),
    ],
)
def test_what_stops_a_run_is_found_with_what_to_do(changes: dict[str, Any], problem: str, remedy: str) -> None:
    ((said, advice),) = found("stop", **changes)
    assert problem in said
    assert remedy in advice


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"nvidia": ["H200, 580.1"]}, "torch does not see the GPU (H200, 580.1): torch 2.13.0+cpu is built for CPUs"),
        ({"nvidia": ["H200"], "torch": {"cuda": "13.0"}, "variables": {"CUDA_VISIBLE_DEVICES": ""}}, "DEVICES=''"),
        ({"torch": GPU, "variables": {"DS_ACCELERATOR": "cpu"}}, "DeepSpeed does not use the GPU"),
        ({"torch": GPU, "compilers": {"gcc": "", "g++": "1", "ninja": "1"}}, "Triton cannot build the kernels"),
        (
            {"torch": GPU, "compilers": {"gcc": "1", "nvcc": "tools, release 12.8"}},
            "torch is built for CUDA 13.0, and nvcc",
        ),
        ({"variables": {"RANK": "0", "WORLD_SIZE": "4"}}, "RANK=0 WORLD_SIZE=4: a run takes itself for one rank"),
        ({"variables": {"OMP_NUM_THREADS": "64"}}, "OMP_NUM_THREADS=64 on 8 cores"),
        ({"network": {"hostname": "pod-7", "address": "", "interfaces": []}}, "pod-7, does not resolve"),
        ({"free": {"/dev/shm": 2**26}}, "0.06 GiB of shared memory are free in /dev/shm"),
        ({"extensions": {"stale_locks": ["/c/adam/lock"]}}, "left /c/adam/lock: the next one waits"),
        ({"unknown": {"memory": "OSError: no /proc"}}, "memory could not be looked at: OSError: no /proc"),
        (with_package("bitsandbytes", "0.45.3"), "adapter=qlora needs bitsandbytes 0.46"),
    ],
)
def test_what_may_be_wrong_is_warned_of(changes: dict[str, Any], problem: str) -> None:
    ((said, _),) = found("warn", **changes)
    assert problem in said


def test_ranks_that_slurm_numbers_are_no_leftover() -> None:
    assert found("warn", variables={"RANK": "0", "SLURM_JOB_ID": "7"}) == []


def test_combinations_that_only_matter_without_a_gpu_are_not_told_with_one() -> None:
    assert [p for p, _ in found("note") if "fp16" in p] == ["torch 2.13.0+cpu: fp16 does not run on a CPU"]
    assert [p for p, _ in found("note", torch=GPU) if "fp16" in p] == []


@pytest.mark.parametrize(
    ("version", "ranges", "inside"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("2.11", ">=2.11.0", True),
        ("4.43.4", ">4.43", False),
        ("4.44.0", ">4.43", True),
        ("5.18.1", ">=5.10 <5.18", False),
        ("5.17.9", ">=5.10 <5.18", True),
        ("", ">=0", False),
        ("unknown", ">=0", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, ranges: str, inside: bool) -> None:
    assert within(version, ranges) is inside


def test_every_combination_has_ranges_that_can_be_read() -> None:
    for known in COMBINATIONS:
        assert all(within("1.0", ranges) in (True, False) for ranges in known.packages.values())


def test_locks_are_stale_after_a_quarter_of_an_hour(tmp_path: Path) -> None:
    for name, age in (("adam", 3600), ("comm", 5)):
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    (tmp_path / "py311_cpu" / "adam" / "fused_adam.so").touch()
    cache = extension_cache(tmp_path)
    assert cache["built"] == ["fused_adam"]
    assert cache["stale_locks"] == [str(tmp_path / "py311_cpu" / "adam" / "lock")]
    assert cache["fresh_locks"] == [str(tmp_path / "py311_cpu" / "comm" / "lock")]


def test_secrets_are_never_shown() -> None:
    shown = variables({"HF_TOKEN": "hf_secret", "SLURM_JWT": "jwt", "AWS_SECRET_ACCESS_KEY": "key", "RANK": "1"})
    assert shown == {"RANK": "1", "HF_TOKEN": "set"}


def test_packages_that_raise_end_the_process_or_hang_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {
        "raises": "raise OSError('libnothing.so is missing')",
        "dies": "import os; os.abort()",
        "leaves": "raise SystemExit(3)",
        "noisy": "print('{\"name\": \"fake\"}'); __version__ = '1.5'",
        "hangs": "import time; time.sleep(60)",
    }
    for name, code in broken.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = {answer["name"]: answer for answer in import_all(list(broken), seconds=3)}
    assert list(answers) == list(broken)
    assert answers["raises"]["error"] == "OSError: libnothing.so is missing"
    assert answers["dies"]["error"] == "its import ended the process with code -6"
    assert answers["leaves"]["error"] == "SystemExit: 3"
    assert answers["noisy"] == {"name": "noisy", "version": "1.5", "error": None, "more": {}}
    assert answers["hangs"]["error"] == "its import did not end within 3 s"


def test_the_table_says_how_many_would_stop_a_run() -> None:
    broken = facts(**with_package("torch", "2.13.0", "ImportError: no"))
    lines = list(render(broken, judge(broken), color=False))
    assert lines[-1] == "1 of these would stop a run"
    assert any(line.startswith("✗ import of torch fails") for line in lines)
    assert not any("\033" in line for line in lines)
    assert any("\033[31m✗" in line for line in render(broken, judge(broken), color=True))


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "lightning_hybrid_cli.py"), "doctor", *arguments]
    everything = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=everything, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_answers_on_this_machine() -> None:
    ended = call("--json")
    answer = json.loads(ended.stdout)
    assert ended.returncode == (0 if answer["ok"] else 1)
    packages = answer["facts"]["packages"]
    assert packages["torch"]["version"] == __import__("torch").__version__
    assert packages["lightning-hybrid"]["error"] is None
    assert answer["facts"]["cores"] >= 1


@pytest.mark.slow
def test_the_command_answers_where_a_package_is_broken(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("raise RuntimeError('built for another torch')")
    ended = call(PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.returncode == 1, ended.stderr
    assert "✗ import of peft fails: RuntimeError: built for another torch" in ended.stdout
    assert "would stop a run" in ended.stdout
    assert "Traceback" not in ended.stderr
