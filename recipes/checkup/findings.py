"""What the facts mean for a run, and what to do about it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass

from checkup.combinations import COMBINATIONS, Level, within
from checkup.facts import Facts

GIB = 2**30
_FULL, _NEARLY_FULL = GIB // 4, 5 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be, or good to know."""

    level: Level
    problem: str
    remedy: str


def judge(facts: Facts) -> list[Finding]:
    """All findings, those that stop a run first."""
    found: list[Finding] = []
    for look in (
        _unknown,
        _packages,
        _combinations,
        _accelerator,
        _build_tools,
        _extensions,
        _launch,
        _slurm,
        _network,
        _main_host,
        _space,
    ):
        found += look(facts)
    return sorted(found, key=lambda finding: ("stop", "warn", "note").index(finding.level))


def _unknown(facts: Facts) -> Iterator[Finding]:
    for what, why in facts.unknown.items():
        yield Finding("warn", f"{what} could not be looked at: {why}", "see whether the message says why")


def _packages(facts: Facts) -> Iterator[Finding]:
    if tuple(map(int, facts.python.split(".")[:2])) < (3, 11):
        yield Finding(
            "stop", f"Python {facts.python} is older than 3.11", "make an environment with Python 3.11 or later"
        )
    for name, least in facts.needed.items():
        package = facts.packages.get(name)
        if package is None or package.error is not None:
            continue
        if not package.version:
            yield Finding("stop", f"{name} is not installed", f'pip install "{name}>={least}"')
        elif package.version[0].isdigit() and within(package.version, f"<{least}"):
            yield Finding("stop", f"{name} {package.version} is older than {least}", f'pip install "{name}>={least}"')
    for name, package in facts.packages.items():
        if package.error is not None:
            level: Level = "stop" if name in facts.needed or name == "lightning-hybrid" else "warn"
            yield Finding(level, f"import of {name} fails: {package.error}", f"pip install --force-reinstall {name}")


def _combinations(facts: Facts) -> Iterator[Finding]:
    here = "gpu" if facts.torch.get("devices") else "cpu"
    for known in COMBINATIONS:
        versions = {name: facts.packages[name].version for name in known.packages if name in facts.packages}
        matches = len(versions) == len(known.packages) and all(
            within(versions[name], ranges) for name, ranges in known.packages.items()
        )
        if matches and known.on in ("both", here):
            names = ", ".join(f"{name} {version}" for name, version in versions.items())
            yield Finding(known.level, f"{names}: {known.problem}", known.remedy)


def _accelerator(facts: Facts) -> Iterator[Finding]:
    seen, asked = bool(facts.torch.get("devices")), facts.variables.get("DS_ACCELERATOR")
    if facts.packages.get("torch") is None or facts.packages["torch"].error is not None:
        return
    if asked == "cpu" and seen:
        yield Finding("warn", "DS_ACCELERATOR=cpu: DeepSpeed does not use the GPU", "unset DS_ACCELERATOR")
    if asked == "cuda" and not seen:
        yield Finding("stop", "DS_ACCELERATOR=cuda, and torch sees no GPU", "unset DS_ACCELERATOR, or see below")
    if facts.nvidia and not seen:
        yield Finding(
            "warn", f"torch does not see the GPU ({facts.nvidia[0]}): {_why_unseen(facts)}", _make_seen(facts)
        )


def _why_unseen(facts: Facts) -> str:
    if not facts.torch.get("cuda"):
        return f"torch {facts.packages['torch'].version} is built for CPUs"
    if "CUDA_VISIBLE_DEVICES" in facts.variables:
        return f"CUDA_VISIBLE_DEVICES={facts.variables['CUDA_VISIBLE_DEVICES']!r}"
    return "; ".join(facts.torch.get("said", [])) or "the driver may be too old for this torch"


def _make_seen(facts: Facts) -> str:
    if not facts.torch.get("cuda"):
        return "install a torch that is built for CUDA"
    if "CUDA_VISIBLE_DEVICES" in facts.variables:
        return "unset CUDA_VISIBLE_DEVICES, or name the GPU in it"
    return f"update the driver, or install a torch for an older CUDA than {facts.torch['cuda']}"


def _build_tools(facts: Facts) -> Iterator[Finding]:
    missing = [name for name in ("g++", "ninja") if not facts.compilers.get(name)]
    if missing:
        yield Finding(
            "note",
            f"no {' and no '.join(missing)}: DeepSpeed's compiled ops cannot be built",
            "none is needed unless strategy.config asks for it (FusedAdam): apt-get install g++; pip install ninja",
        )
    if not facts.torch.get("devices"):
        return
    if not facts.compilers.get("gcc"):
        yield Finding("warn", "no gcc: Triton cannot build the kernels of the rollout", "apt-get install gcc")
    nvcc, cuda = facts.compilers.get("nvcc", ""), str(facts.torch.get("cuda"))
    if nvcc and f"release {cuda.split('.')[0]}." not in nvcc:
        yield Finding(
            "warn",
            f"torch is built for CUDA {cuda}, and nvcc says '{nvcc}': DeepSpeed refuses to compile ops",
            f"point CUDA_HOME at a CUDA {cuda.split('.')[0]}, or do without FusedAdam and the like",
        )


def _extensions(facts: Facts) -> Iterator[Finding]:
    for lock in facts.extensions.get("stale_locks", []):
        yield Finding("warn", f"a build that was killed left {lock}: the next one waits for it for ever", f"rm {lock}")
    for lock in facts.extensions.get("fresh_locks", []):
        yield Finding("note", f"{lock}: something is being built there", "if nothing is, remove it")


def _launch(facts: Facts) -> Iterator[Finding]:
    given = {name: facts.variables[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in facts.variables}
    if "TORCHELASTIC_RUN_ID" in facts.variables:
        total, here = (facts.variables.get(name, "") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        yield from _needed("torchrun", total, here)
    elif given and "SLURM_JOB_ID" not in facts.variables:
        shown = " ".join(f"{name}={value}" for name, value in given.items())
        yield Finding(
            "warn", f"{shown}: a run takes itself for one rank of several and waits", f"unset {' '.join(given)}"
        )
    threads = facts.variables.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > facts.cores > 0:
        problem = f"OMP_NUM_THREADS={threads} on {facts.cores} cores: threads wait for each other"
        yield Finding("warn", problem, f"export OMP_NUM_THREADS={facts.cores} or less, divided by the ranks")


def _slurm(facts: Facts) -> Iterator[Finding]:
    names = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_NAME")
    total, here, nodes, job = (facts.variables.get(name, "") for name in names)
    if not total.isdigit() or total == "1":
        return
    if job in ("bash", "interactive"):
        problem = f"Lightning takes a job called '{job}' for one to work in: its {total} tasks do not train together"
        yield Finding("stop", problem, "start them by srun in a job of another name (--job-name)")
    elif not here.isdigit():
        yield Finding("stop", f"{total} tasks, and Lightning needs their number on each host", "--ntasks-per-node=…")
    elif nodes.isdigit() and int(total) != int(here) * int(nodes):
        problem = f"{total} tasks are not {here} on each of {nodes} hosts: a run refuses to start"
        yield Finding("stop", problem, f"leave out --ntasks, or set it to {int(here) * int(nodes)}")
    else:
        yield from _needed("srun", total, here)


def _needed(launcher: str, total: str, here: str) -> Iterator[Finding]:
    if total.isdigit() and here.isdigit():
        needed = f"trainer.devices={here} trainer.num_nodes={int(total) // int(here)}"
        yield Finding("note", f"{launcher} starts {total} processes, {here} on each host", f"a run needs {needed}")


def _main_host(facts: Facts) -> Iterator[Finding]:
    """The host of rank 0, where a run on several is to meet."""
    if not facts.main:
        return
    name, address, failure = (facts.main[key] for key in ("name", "address", "failure"))
    several = facts.variables.get("SLURM_NNODES", "1") != "1" or facts.variables.get("NODE_RANK", "0") != "0"
    if not address:
        yield Finding("stop", f"MASTER_ADDR={name} does not resolve", "give the address of the first host")
    elif failure:
        problem = f"MASTER_ADDR={name} ({address}) cannot be reached: {failure}"
        yield Finding("stop", problem, "see whether it is up, the network between the hosts, and their firewalls")
    elif several and ipaddress.ip_address(address.split("%")[0]).is_loopback:
        problem = f"MASTER_ADDR={name} is {address}, which is another host on each host: they would never meet"
        yield Finding("stop", problem, "give an address of the first host that all others reach")
    if "NODE_RANK" in facts.variables and "MASTER_PORT" not in facts.variables:
        yield Finding("stop", "NODE_RANK and no MASTER_PORT", "export MASTER_PORT=29500, the same on all hosts")


def _network(facts: Facts) -> Iterator[Finding]:
    if facts.network and not facts.network["address"]:
        name = facts.network["hostname"]
        yield Finding(
            "warn",
            f"the host's name, {name}, does not resolve: torchrun's rendezvous fails, and gloo may not connect ranks",
            f"echo '127.0.0.1 {name}' >> /etc/hosts, or, for a host that is one of several, its address there",
        )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        given = facts.variables.get(variable, "")
        prefixes = [name for name in given.lstrip("^=").split(",") if name]
        there = facts.network.get("interfaces", [])
        if prefixes and not given.startswith("^") and not any(n.startswith(p) for p in prefixes for n in there):
            problem = f"{variable}={given} is no interface; there are: {', '.join(there)}"
            yield Finding("stop", problem, f"unset {variable}, or name one of them")


def _space(facts: Facts) -> Iterator[Finding]:
    for name, free in facts.free.items():
        shown = f"{free / GIB:.2f} GiB"
        if name == "/dev/shm":
            if free < _FULL:
                remedy = "data loader workers and NCCL need it: in a container, --shm-size=2g"
                yield Finding("warn", f"{shown} of shared memory are free in /dev/shm", remedy)
        elif free < _FULL:
            yield Finding("stop", f"{shown} of disk are free ({name}): checkpoints need more", "make room")
        elif free < _NEARLY_FULL:
            yield Finding("warn", f"{shown} of disk are free ({name})", "a checkpoint takes 12 to 16 bytes a parameter")
