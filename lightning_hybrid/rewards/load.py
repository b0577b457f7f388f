"""The reward of a configuration: a function by its name, an endpoint by its address."""

from __future__ import annotations

import importlib
from types import ModuleType

from lightning_hybrid.config import RewardSourceConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.rewards.function import RewardCallable, RewardFunction
from lightning_hybrid.rewards.remote import RemoteReward

FORMAT = '"package.module:function"'


def reward_from(source: RewardSourceConfig) -> str | RewardFunction | RemoteReward:
    """The reward that a configuration names, as `PPOModule` takes it: for a reward model, its path.

    Raises:
        ConfigError: The function or the endpoint cannot be used.
    """
    if source.url is not None:
        return RemoteReward(source.url, source.token_variable, source.timeout_seconds, source.retries)
    if source.function is not None:
        return RewardFunction(load_reward_function(source.function), source.timeout_seconds)
    return str(source.path)


def load_reward_function(spec: str) -> RewardCallable:
    """Imports the function that ``"package.module:function"`` names.

    Args:
        spec: A module that Python can import, a colon, and the name of a callable in it.

    Returns:
        The callable.

    Raises:
        ConfigError: The format is wrong, the module cannot be imported, or the name is missing or not callable.
    """
    module_name, _, name = spec.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ConfigError(f"reward function {spec!r} has the wrong format: write {FORMAT}")
    module = _import(module_name, spec)
    if not hasattr(module, name):
        raise ConfigError(
            f"reward function {spec!r}: module {module_name!r} ({module.__file__}) has no {name!r}; "
            f"it has {_callables(module)}"
        )
    function: RewardCallable = getattr(module, name)
    if not callable(function):
        raise ConfigError(
            f"reward function {spec!r} is {function!r}, which cannot be called: name a function "
            "reward(prompts, responses)"
        )
    return function


def _import(module_name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does while it is imported
        raise ConfigError(
            f"reward function {spec!r}: importing {module_name!r} raised {type(error).__name__}: {error}; "
            "install the package, or put its folder on PYTHONPATH"
        ) from error


def _callables(module: ModuleType) -> str:
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    return ", ".join(names[:10]) or "no public callable"
