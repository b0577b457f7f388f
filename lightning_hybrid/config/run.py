"""Compose, validate, run: what stands between the command line and a recipe's job."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_hybrid.config.command_line import (
    HYDRA_VERSION,
    find_problem,
    force,
    prepare,
    register_help,
    show,
    shows_only,
)
from lightning_hybrid.config.validate import validate
from lightning_hybrid.errors import ConfigError, LightningHybridError
from lightning_hybrid.paths import conf_dir
from lightning_hybrid.settings import Settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

SettingsT = TypeVar("SettingsT", bound=Settings)


def recipe_main(config_name: str, schema: type[SettingsT], job: Callable[[SettingsT], object]) -> None:
    """Run a recipe from the command line: compose `conf/<config_name>.yaml`, validate it, call `job` with the result.

    Hydra's options work (`-m` sweeps, `--cfg job`, `--info`, `--help`, `-sc`). In a sweep each job has its own folder
    as `output_dir`, an error ends that job only, and `report.sweep.SweepSummary` says in the end what they came to.
    Otherwise an error of ours ends the process with its message on stderr and exit code 2; `HYDRA_FULL_ERROR=1` shows
    where it was raised. With `launcher=ray` the job is done by workers of Ray, see `clusters.launch`.

    Args:
        config_name: Name of the primary configuration, such as "ppo".
        schema: Settings that the job expects, such as `PPORun`.
        job: The recipe itself.
    """
    import hydra

    script, arguments, conf = os.path.abspath(sys.argv[0]), sys.argv[1:], conf_dir()
    if shows_only(arguments):
        show(config_name, arguments, conf)
        return

    def task(cfg: DictConfig) -> None:
        with _clean_errors(), _one_job_of_a_sweep(cfg, script):
            _start(validate(schema, cfg), job)

    with _clean_errors():
        refuse_choices(config_name, arguments)
    sys.argv = [sys.argv[0], *prepare(arguments, conf)]
    register_help(config_name, conf)
    hydra.main(version_base=HYDRA_VERSION, config_path=str(conf), config_name=config_name)(task)()


def _start(run: SettingsT, job: Callable[[SettingsT], object]) -> None:
    """Call the job with its settings: in this process, or where their `launcher` says."""
    launcher = getattr(run, "launcher", None)
    if launcher is None or launcher.name == "local":
        job(run)
        return
    # By name: a configuration stands below whatever acts on it.
    launch: Any = importlib.import_module("lightning_hybrid.clusters").launch
    launch(run, job)


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

    refuse_choices(config_name, overrides)
    try:
        with _set_aside_running_hydra(), hydra.initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION):
            cfg = hydra.compose(config_name, overrides=[force(override, conf_dir()) for override in overrides])
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


def refuse_choices(config_name: str, overrides: Sequence[str]) -> None:
    """Refuse a choice that the recipe does not have, and a launcher or sweeper whose package is not installed.

    Raises:
        ConfigError: with the nearest choice, or with what to install.
    """
    problem = find_problem(config_name, overrides, conf_dir())
    if problem:
        raise ConfigError(problem)


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Turn an error of ours into its message and exit code 2, rather than a traceback."""
    try:
        yield
    except LightningHybridError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or _in_a_sweep():
            raise
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK"))
        sys.stderr.write(f"error{'' if rank is None else f' (rank {rank})'}: {error}\n")
        sys.exit(2)


def _in_a_sweep() -> bool:
    """Whether this is one job of several, whose error must not end the others."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def _one_job_of_a_sweep(cfg: DictConfig, script: str) -> Iterator[None]:
    """Give a job of a sweep its own folder, and leave nothing of it to the next one.

    Lightning starts the other ranks with this process's command line, so it is made to name the recipe, this job's
    values and where configurations lie, rather than the sweep's or those of a worker of joblib or submitit. It
    remembers a launch in environment variables, which would make the next job believe that it is launched already.
    """
    if not _in_a_sweep():
        yield
        return
    main, argv, environment = sys.modules["__main__"], sys.argv, dict(os.environ)
    specification = main.__spec__
    sys.argv = [script, *_move_to_own_folder(cfg)]
    main.__spec__ = None
    try:
        yield
    finally:
        sys.argv, main.__spec__ = argv, specification
        os.environ.clear()
        os.environ.update(environment)
        _leave_process_group()


def _move_to_own_folder(cfg: DictConfig) -> list[str]:
    """Set the job's folder wherever it is named, and return the overrides that make the same run alone."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, read_write

    hydra_cfg: Any = HydraConfig.get()
    folder = cfg.output_dir = hydra_cfg.runtime.output_dir
    with read_write(hydra_cfg):
        hydra_cfg.run.dir = folder
    if hydra_cfg.output_subdir is not None:  # Hydra has kept the folder that the job would have had alone
        OmegaConf.save(cfg, Path(folder) / hydra_cfg.output_subdir / "config.yaml")
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    return [*hydra_cfg.overrides.task, f"++output_dir='{quoted}'", *_further_configurations(hydra_cfg)]


def _further_configurations(hydra_cfg: Any) -> list[str]:
    """The arguments that make Hydra look for configurations where it looked for this job's, beside our own."""
    folders = [source.path for source in hydra_cfg.runtime.config_sources if source.provider == "command-line"]
    searched = [text for text in hydra_cfg.overrides.hydra if text.startswith("hydra.searchpath=")]
    return [*searched, *(text for folder in folders for text in ("--config-dir", folder))]


def _leave_process_group() -> None:
    if "torch.distributed" in sys.modules:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
