"""What `launcher` may say, and what is said where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_hybrid.assemble import make_trainer
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.config import LauncherConfig, PPORun, SFTRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.paths import conf_dir

NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "trainer=cpu"]
ROOT = Path(__file__).resolve().parents[2]


def composed(*changes: str) -> SFTRun:
    return compose_run("sft", SFTRun, [*NEEDED, *changes])


def test_a_run_is_local_unless_it_says_otherwise() -> None:
    assert composed().launcher == LauncherConfig()
    assert LauncherConfig().name == "local"


def test_the_yaml_of_ray_has_every_key_with_the_default_of_python() -> None:
    written = OmegaConf.to_container(OmegaConf.load(conf_dir() / "launcher" / "ray.yaml"))
    assert written == LauncherConfig(name="ray").model_dump()
    assert composed("launcher=ray").launcher == LauncherConfig(name="ray")


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "kto", "ppo"])
def test_every_recipe_that_trains_offers_it(recipe: str) -> None:
    defaults = OmegaConf.load(conf_dir() / f"{recipe}.yaml").defaults
    assert {"launcher": "local"} in defaults


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("launcher.max_failures=5", "launcher.max_failures = 5: has no effect without launcher=ray"),
        ("launcher.placement=SPREAD", "launcher.placement = 'SPREAD': has no effect without launcher=ray"),
    ],
)
def test_what_only_ray_heeds_needs_ray(change: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        composed(change)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("launcher.address='ray://head:10001'", "Ray Train does not run through Ray Client"),
        ("launcher.placement=SCATTER", "launcher.placement = 'SCATTER': must be 'PACK' or 'SPREAD'"),
        ("launcher.max_failures=-1", "launcher.max_failures = -1: must be greater than or equal to 0"),
        ("launcher.gpus_per_rank=2.0", "must be less than or equal to 1"),
        ("launcher.gpus_per_rank=1.0", "launcher.gpus_per_rank = 1: does not fit trainer.accelerator=cpu"),
        ("launcher.gpus_per_rank=0.5", "launcher.gpus_per_rank = 0.5: Ray would put two ranks on one GPU"),
        ("trainer.devices=auto", "trainer.devices = 'auto': launcher=ray needs a number"),
        ("trainer.devices='0,1'", "trainer.devices = '0,1': launcher=ray needs a number"),
    ],
)
def test_what_ray_cannot_do_is_refused(change: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        composed("launcher=ray", change)


def test_hydras_own_launchers_are_other_ones() -> None:
    run = compose_run("sft", SFTRun, [*NEEDED, "launcher=ray", "hydra/launcher=basic"])
    assert run.launcher.name == "ray"
    with pytest.raises(ConfigError, match=r"launcher=slurm: no such choice.* There are: local, ray"):
        composed("launcher=slurm")


def test_a_stage_that_is_called_from_python_is_not_run_without_ray_in_silence(tmp_path: Path) -> None:
    run = composed("launcher=ray", f"output_dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"this process is no worker of Ray.*clusters\.launch"):
        make_trainer(run, "sft", HFExport(tmp_path, "policy", None))  # type: ignore[arg-type]


def test_the_plan_of_a_run_with_ray_is_made_without_it() -> None:
    from lightning_hybrid.config import PlanRun

    run = compose_run("plan", PlanRun, ["model.path=a-model", "launcher=ray"])
    assert isinstance(run, PPORun)
    assert run.launcher.name == "ray"


def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    command = [*NEEDED, "launcher=ray", f"output_dir={tmp_path}"]
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv = ['sft.py', *sys.argv[1:]]\n"
        "from lightning_hybrid.config import SFTRun\n"
        "from lightning_hybrid.config.run import recipe_main\n"
        "recipe_main('sft', SFTRun, lambda run: print('it ran'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert 'launcher=ray needs the package ray: pip install "lightning-hybrid[ray]"' in ended.stderr
    assert "it ran" not in ended.stdout
