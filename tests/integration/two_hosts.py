"""The same command on two hosts, started in each of the ways that a user has."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.integration import small_run
from tests.integration.hosts import Host, Running
from tests.integration.processes import ROOT

PORT = "29500"  # hosts have their ports for themselves
COMMAND = ROOT / "lightning_hybrid_cli.py"
SMALL = Path(small_run.__file__)


def by_torchrun(hosts: Sequence[Host], job: Sequence[object], ranks: int, *more: str, **extra: str) -> list[Running]:
    """With a rendezvous; the hosts number themselves."""
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0].name}:{PORT}", "--rdzv-id=job", *more]
    return [host.start("run", *_torchrun(ranks), *meet, *job, **extra) for host in hosts]


def by_static_torchrun(hosts: Sequence[Host], job: Sequence[object], ranks: int, **extra: str) -> list[Running]:
    """With the first host's address, and a number for each."""
    meet = [f"--master-addr={hosts[0].address}", f"--master-port={PORT}"]
    return [
        host.start("run", *_torchrun(ranks), *meet, f"--node-rank={i}", *job, **extra) for i, host in enumerate(hosts)
    ]


def _torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={ranks}"]


def by_lightning(hosts: Sequence[Host], job: Sequence[object], ranks: int, **extra: str) -> list[Running]:
    """The command once on each host; Lightning starts the other ranks there."""
    meet = {"MASTER_ADDR": hosts[0].name, "MASTER_PORT": PORT} | extra
    return [host.start("run", sys.executable, *job, NODE_RANK=str(i), **meet) for i, host in enumerate(hosts)]


def by_slurm(hosts: Sequence[Host], job: Sequence[object], ranks: int, **extra: str) -> list[Running]:
    """With the variables that srun sets for each task. There is no SLURM here: nothing but those variables is tried."""
    shared = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "lightning-hybrid",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": str(2 * ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_TASKS_PER_NODE": f"{ranks}(x2)",
        **{f"SLURM_{part}NODELIST": "node[1-2]" for part in ("", "JOB_", "STEP_")},
    }
    tasks = [(i, host, local) for i, host in enumerate(hosts) for local in range(ranks)]
    numbers = [
        {"SLURM_NODEID": str(i), "SLURM_PROCID": str(i * ranks + n), "SLURM_LOCALID": str(n)} for i, _, n in tasks
    ]
    return [
        host.start(f"task{local}", sys.executable, *job, **shared, **number, **extra)
        for (_, host, local), number in zip(tasks, numbers, strict=True)
    ]


LAUNCHES = {"torchrun": by_torchrun, "static": by_static_torchrun, "slurm": by_slurm, "lightning": by_lightning}


def write_data(folder: Path) -> None:
    """Prompts and texts for the small real model."""
    begin = [f"Once upon a time there were {count} small" for count in range(2, 34)]
    prompts = [json.dumps({"prompt": text}) for text in begin]
    texts = [json.dumps({"prompt": text, "response": f" dogs, and cat {i} saw it."}) for i, text in enumerate(begin)]
    (folder / "ppo.jsonl").write_text("\n".join(prompts))
    (folder / "sft.jsonl").write_text("\n".join(texts))


def recipe(name: str, data: Path, model: Path, output: Path, nodes: int, devices: int, steps: int = 4) -> list[object]:
    """The command of a run on a small real model that takes seconds."""
    common = [f"output_dir={output}", f"model.path={model}", "trainer=cpu", "trainer.deterministic=true"]
    common += [f"trainer.num_nodes={nodes}", f"trainer.devices={devices}", f"trainer.max_steps={steps}"]
    common += ["trainer.enable_progress_bar=false", "data.batch_size=4", f"data.path={data}/{name}.jsonl"]
    own = {
        "sft": ["trainer.max_epochs=null"],
        "ppo": ["rollout.max_new_tokens=12", "algorithm.minibatch_size=8", "reward.penalty=repetition"],
    }
    return [COMMAND, name, *common, *own[name]]


def small(output: Path, *changes: str) -> list[object]:
    """A run of the built-in task's PPO on two hosts; its data lies beside its output."""
    return [SMALL, "ppo", output, "trainer.num_nodes=2", "trainer.deterministic=true", *changes]
