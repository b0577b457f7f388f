"""What a run demands of a cluster."""

from __future__ import annotations

from lightning_hybrid.clusters.connection import Share
from lightning_hybrid.clusters.servers import gpus_of_server
from lightning_hybrid.config import PPORun, Run
from lightning_hybrid.config.roots import ranks_of


def ranks_share(run: Run) -> Share:
    """That of the ranks; ``trainer.accelerator`` is known."""
    count, launcher = ranks_of(run.trainer), run.launcher
    assert count is not None, "launcher=ray is refused without a number of devices"
    gpus = float(on_gpus(run)) if launcher.gpus_per_rank is None else launcher.gpus_per_rank
    return Share("ranks", count, launcher.cpus_per_rank, gpus)


def shares_of(run: Run) -> list[Share]:
    """Those of ranks and of all servers of roles."""
    servers = _servers(run) if isinstance(run, PPORun) else []
    return [ranks_share(run), *servers]


def on_gpus(run: Run) -> bool:
    """Whether the ranks train on GPUs."""
    return run.trainer.accelerator != "cpu"


def _servers(run: PPORun) -> list[Share]:
    launcher, vllm = run.launcher, run.rollout.vllm
    engines = vllm.processes if run.rollout.backend == "vllm" else 0
    roles = {"reference": run.roles.reference, "reward": run.roles.reward}
    shares = [
        Share(f"server of the {name} model", 1, launcher.cpus_per_server, _gpus(run, role.device is not None))
        for name, role in roles.items()
        if role.separate
    ]
    if engines:
        gpus = _gpus(run, vllm.tensor_parallel_size)
        shares.append(Share("vLLM engines", engines, launcher.cpus_per_server, gpus))
    return shares


def _gpus(run: PPORun, devices: int) -> float:
    return gpus_of_server(run.launcher, on_gpus(run), devices)
