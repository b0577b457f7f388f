"""Compose, validate, run: what stands between the command line and a recipe's job."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from lightning_hybrid.config.validate import validate
from lightning_hybrid.errors import ConfigError, LightningHybridError
from lightning_hybrid.paths import conf_dir
from lightning_hybrid.settings import Settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

SettingsT = TypeVar("SettingsT", bound=Settings)
_HYDRA_VERSION = "1.3"
_PLAIN_OVERRIDE = re.compile(r"^([A-Za-z_][\w.]*)=")


def recipe_main(config_name: str, schema: type[SettingsT], job: Callable[[SettingsT], object]) -> None:
    """Run a recipe from the command line: compose `conf/<config_name>.yaml`, validate it, call `job` with the result.

    Hydra's options work (`-m` sweeps, `--cfg job`, `--help`). In a sweep each job has its own folder as `output_dir`.
    An error of ours ends the process with its message on stderr and exit code 2; `HYDRA_FULL_ERROR=1` shows where it
    was raised.

    Args:
        config_name: Name of the primary configuration, such as "ppo".
        schema: Settings that the job expects, such as `PPORun`.
        job: The recipe itself.
    """
    import hydra

    def task(cfg: DictConfig) -> None:
        with _clean_errors(), _one_job_of_a_sweep(cfg):
            job(validate(schema, cfg))

    arguments = [_force(argument) for argument in sys.argv[1:]]
    sys.argv = [sys.argv[0], *arguments]
    hydra.main(version_base=_HYDRA_VERSION, config_path=str(conf_dir()), config_name=config_name)(task)()


def compose_run(config_name: str, schema: type[SettingsT], overrides: Sequence[str] = ()) -> SettingsT:
    """Compose and validate a configuration in Python, also inside a running recipe or a notebook.

    Args:
        config_name: Name of the primary configuration, such as "ppo".
        schema: Settings to return, such as `PPORun`.
        overrides: Hydra overrides, such as "experiment=quickstart/ppo" or "algorithm.kl_coef=0.01".

    Raises:
        ConfigError: when an override names no choice of a group, or the configuration is not valid.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with _set_aside_running_hydra(), hydra.initialize_config_dir(str(conf_dir()), version_base=_HYDRA_VERSION):
            cfg = hydra.compose(config_name, overrides=[_force(override) for override in overrides])
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group given a number
        problem = f"cannot compose '{config_name}' with {list(overrides)}: {error}"
        raise ConfigError(problem.encode(errors="backslashreplace").decode()) from error
    return validate(schema, cfg)


@contextmanager
def _set_aside_running_hydra() -> Iterator[None]:
    """Hydra composes for one application per process; inside a recipe, its own is put back afterwards."""
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = outer


def _force(override: str) -> str:
    """Let an unknown key through composition, so that validation reports it together with everything else.

    Choices of a group, Hydra's own keys and options are left as they are.
    """
    match = _PLAIN_OVERRIDE.match(override)
    if match is None or match[1].split(".")[0] == "hydra" or (conf_dir() / match[1]).is_dir():
        return override
    return f"++{override}"


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Turn an error of ours into its message and exit code 2, rather than a traceback."""
    try:
        yield
    except LightningHybridError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK"))
        sys.stderr.write(f"error{'' if rank is None else f' (rank {rank})'}: {error}\n")
        sys.exit(2)


@contextmanager
def _one_job_of_a_sweep(cfg: DictConfig) -> Iterator[None]:
    """Give a job of a sweep its own folder, and leave nothing of it to the next one.

    Lightning starts the other ranks with `sys.argv`, so it holds this job's values rather than the sweep's, and it
    remembers a launch in environment variables, which would make the next job believe that it is launched already.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        yield
        return
    cfg.output_dir = hydra_cfg.runtime.output_dir
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [argv[0], *hydra_cfg.overrides.task, f"++output_dir={cfg.output_dir}"]
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        _leave_process_group()


def _leave_process_group() -> None:
    if "torch.distributed" in sys.modules:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
