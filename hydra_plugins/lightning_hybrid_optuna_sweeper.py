"""Makes `hydra/sweeper=optuna` known: Hydra takes sweepers from the namespace `hydra_plugins` only.

Hydra imports this file in every program of an environment, so it loads nothing before a sweep.
"""

from __future__ import annotations

import sys
from typing import Any

from hydra.plugins.sweeper import Sweeper


class OptunaSweeper(Sweeper):  # type: ignore[misc]
    """Optuna of today as Hydra's sweeper; its keys are those of `conf/hydra/sweeper/optuna.yaml`."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Take what Hydra gives a sweeper."""
        from hydra.core.plugins import Plugins

        self._context, self._config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the trials; the best value, or None when all failed."""
        from lightning_hybrid.config.search import search
        from lightning_hybrid.errors import LightningHybridError

        try:
            return search(arguments, self._settings, self._config, self._context.config_loader, self._launcher)
        except LightningHybridError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
