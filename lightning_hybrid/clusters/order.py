"""What a driver sends to its workers: the recipe's function, its settings, and what is set around it."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_hybrid.config import Run
from lightning_hybrid.serving.process import is_of_ranks
from lightning_hybrid.settings import without_credentials

# What belongs to a host, a login or a process, and not to the run.
OF_HOST = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "HOSTNAME", "HOST", "PWD", "OLDPWD", "SHLVL", "TERM", "MAIL", "_"),
    *("TMPDIR", "TMP", "TEMP", "DISPLAY", "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "PYTHONBREAKPOINT", "COLUMNS", "LINES", "LS_COLORS"),
}
OF_HOST_PREFIXES = ("RAY_", "SLURM_", "SSH_", "XDG_", "DBUS_", "CONDA_", "BASH_", "PYTEST_")
RESTARTS = "SLURM_RESTART_COUNT"  # of a command that SLURM has started again
SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "CREDENTIAL", "AUTH")


@dataclass(frozen=True)
class Order:
    """What each rank is to do.

    Attributes:
        job: the recipe's function.
        schema: of its settings; that of one algorithm is found by the values, as it cannot be sent.
        values: of the settings, validated before.
        run_id: of this command, the same after each loss of a worker.
        folder: in which the command was given.
        variables: of the environment, those that are nobody else's business, which Ray would show in its dashboard.
    """

    job: Callable[[Any], object]
    schema: type[Run]
    values: dict[str, Any]
    run_id: str
    folder: str
    variables: dict[str, str]

    @classmethod
    def of(cls, job: Callable[[Any], object], run: Run, run_id: str) -> Order:
        """To do ``job`` with ``run`` as this process would."""
        schema = next(kind for kind in type(run).__mro__ if _can_be_imported(kind))
        return cls(job, schema, run.model_dump(), run_id, str(Path.cwd()), secret_variables())

    def run(self) -> Run:
        """The settings as they were."""
        return self.schema.schema_for(self.values).model_validate(self.values)


def shown_variables() -> dict[str, str]:
    """The environment that workers begin with, which Ray shows in its dashboard: no secrets, and where code lies."""
    return _variables(secret=False) | {"PYTHONPATH": os.pathsep.join(code_folders())}


def secret_variables() -> dict[str, str]:
    """The environment that is nobody else's business."""
    return _variables(secret=True)


def _variables(*, secret: bool) -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name not in OF_HOST and not is_of_ranks(name)
        if name == RESTARTS or not name.startswith(OF_HOST_PREFIXES)
        if secret == _is_secret(name, value)
    }


def _is_secret(name: str, value: str) -> bool:
    """By its name, or as the address of a proxy or a database with a password in it."""
    return any(word in name.upper() for word in SECRET) or without_credentials(value) != value


def code_folders() -> list[str]:
    """Where this process finds code beside what is installed: its checkout, the recipe's folder, the current one."""
    installed = [Path(folder).resolve() for folder in (*site.getsitepackages(), *sysconfig.get_paths().values())]
    folders = dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path if not entry.endswith(".zip"))
    return [str(folder) for folder in folders if not any(folder.is_relative_to(place) for place in installed)]


def _can_be_imported(kind: type) -> bool:
    return getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
