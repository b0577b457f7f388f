"""Settings of what starts the processes of a run: this command, or Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from lightning_hybrid.settings import Problem, Rule, Settings

if TYPE_CHECKING:
    from lightning_hybrid.config.roots import Run


def _the_rest_is_rays(config: LauncherConfig) -> Problem | None:
    if config.name == "ray":
        return None
    for key, field in LauncherConfig.model_fields.items():
        if key != "name" and (value := getattr(config, key)) != field.default:
            return Problem(key, "has no effect without launcher=ray", repr(value))
    return None


def _no_client_of_ray(config: LauncherConfig) -> Problem | None:
    if config.address is None or not config.address.startswith("ray://"):
        return None
    remedy = "Ray Train does not run through Ray Client: give host:port of the cluster, or use ray job submit"
    return Problem("address", remedy, repr(config.address))


def _a_gpu_has_one_rank(config: LauncherConfig) -> Problem | None:
    if config.gpus_per_rank is None or config.gpus_per_rank == 0 or config.gpus_per_rank > 0.5:
        return None
    remedy = "Ray would put two ranks on one GPU, which NCCL refuses: give more than 0.5, and servers may have the rest"
    return Problem("gpus_per_rank", remedy, f"{config.gpus_per_rank:g}")


class LauncherConfig(Settings):
    """What starts the processes of a run."""

    rules: ClassVar[tuple[Rule, ...]] = (_the_rest_is_rays, _no_client_of_ray, _a_gpu_has_one_rank)

    name: Literal["local", "ray"] = "local"
    """local: this command, torchrun or SLURM; ray: Ray Train, on trainer.devices times trainer.num_nodes workers"""
    address: str | None = None
    """host:port of a running cluster, or auto; null: RAY_ADDRESS, or a cluster of this machine for this run alone"""
    placement: Literal["PACK", "SPREAD"] = "PACK"
    """PACK: ranks, and servers, on as few nodes as hold them; SPREAD: on as many"""
    cpus_per_rank: PositiveFloat = 1.0
    """cores that Ray sets aside for a rank"""
    gpus_per_rank: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """GPUs that Ray sets aside for a rank; null: 1, and 0 where trainer.accelerator is the CPU"""
    cpus_per_server: PositiveFloat = 1.0
    """cores for each role in a process of its own"""
    gpus_per_server: NonNegativeFloat | None = None
    """GPUs for each of them; null: as many as it uses"""
    max_failures: NonNegativeInt = 3
    """lost workers, after each of which the run goes on from its newest checkpoint; one more ends it"""
    startup_timeout_seconds: PositiveFloat = 300.0
    """how long ranks, or servers, wait for resources that others use"""


def ray_is_given_numbers(run: Run) -> Problem | None:
    """Ray chooses the devices: it must be known how many there are to be."""
    if run.launcher.name != "ray" or isinstance(run.trainer.devices, int):
        return None
    remedy = (
        "launcher=ray needs a number: ranks are trainer.devices times trainer.num_nodes, and Ray chooses their GPUs"
    )
    return Problem("trainer.devices", remedy, repr(run.trainer.devices))


def ray_has_gpus_for_ranks(run: Run) -> Problem | None:
    """What the Trainer runs on is what Ray sets aside."""
    gpus, accelerator = run.launcher.gpus_per_rank, run.trainer.accelerator
    if run.launcher.name != "ray" or gpus is None or accelerator == "auto" or (gpus > 0) == (accelerator != "cpu"):
        return None
    return Problem(
        "launcher.gpus_per_rank", f"does not fit trainer.accelerator={accelerator}: leave it out", f"{gpus:g}"
    )
