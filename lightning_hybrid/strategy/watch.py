"""Keeps models from running while part of them sleeps: reading memory that is gone would end the process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_hybrid.engines.belongings import Belonging
from lightning_hybrid.errors import StrategyError


class Watch:
    """Make modules refuse to run, until they may again.

    Args:
        engines: engines and modules, by name.
    """

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self._engines = dict(engines)
        self._modules = {name: getattr(engine, "module", engine) for name, engine in engines.items()}
        self._handles: dict[tuple[str, str], list[RemovableHandle]] = {}

    def refuse(self, belonging: Belonging, phase: str | None) -> None:
        """From now on whatever reads what sleeps raises: all that reads weights, or a forward that is to be trained on.

        A learned reward calls the model inside its wrapper, so every module with weights of its own is watched.
        """
        key = (belonging.engine, belonging.kind)
        if key in self._handles:
            return
        root = self._modules[belonging.engine]
        if belonging.kind == "weights":
            self._tell(belonging, _reason(belonging, phase, "run"))
            refuse = _refusal(belonging, phase, training_only=False)
            watched = [module for module in root.modules() if module._parameters]
        else:
            refuse, watched = _refusal(belonging, phase, training_only=True), [root]
        self._handles[key] = [module.register_forward_pre_hook(refuse, prepend=True) for module in watched]

    def allow(self, belonging: Belonging) -> None:
        """What was put to sleep is awake again."""
        if belonging.kind == "weights":
            self._tell(belonging, None)
        for handle in self._handles.pop((belonging.engine, belonging.kind), []):
            handle.remove()

    def _tell(self, belonging: Belonging, reason: str | None) -> None:
        """Containers read the weights without calling the modules: a hybrid engine has to know by itself."""
        engine = self._engines[belonging.engine]
        if hasattr(engine, "asleep"):
            engine.asleep = reason


def _refusal(belonging: Belonging, phase: str | None, training_only: bool) -> Callable[[nn.Module, Any], None]:
    reason = _reason(belonging, phase, "trained" if training_only else "run")

    def refuse(module: nn.Module, _: Any) -> None:
        if not training_only or torch.is_grad_enabled():
            raise StrategyError(reason)

    return refuse


def _reason(belonging: Belonging, phase: str | None, what: str) -> str:
    when = "between phases" if phase is None else f"in phase {phase!r}"
    return (
        f"{belonging.engine or 'the module'} was {what} {when}, where {belonging.owner} sleeps "
        f"(strategy.sleep.{belonging.setting}): enter the phase that needs it first, naming it in `runs`"
    )
