"""The reward of a configuration, built from its one source or from its terms."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from lightning_hybrid.config import RewardSourceConfig
from lightning_hybrid.config.reward import RewardTermConfig
from lightning_hybrid.config.roles import FrozenRoleConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import load_scalar, load_tokenizer
from lightning_hybrid.rewards.base import Reward
from lightning_hybrid.rewards.cache import CachedReward, FileStore, MemoryStore, Store
from lightning_hybrid.rewards.classifier import load_classifier
from lightning_hybrid.rewards.function import RewardCallable, RewardFunction
from lightning_hybrid.rewards.learned import LearnedReward
from lightning_hybrid.rewards.remote import RemoteReward
from lightning_hybrid.rewards.served import ServedReward
from lightning_hybrid.rewards.verify import ExactReward, FormatReward, GSM8KReward, MathReward, RepetitionPenalty
from lightning_hybrid.rewards.weighted import WeightedRewards

FORMAT = '"package.module:function"'
VERIFIERS: dict[str, Callable[[str, float], Reward]] = {"math": MathReward, "gsm8k": GSM8KReward, "exact": ExactReward}
# Judged faster than looked up.
CHEAP = (GSM8KReward, ExactReward, FormatReward, RepetitionPenalty)


def reward_from(source: RewardSourceConfig, role: FrozenRoleConfig | None = None) -> Reward:
    """The reward that a configuration names, as `PPOModule` takes it.

    Args:
        source: of the scores.
        role: says where reward models are; by default in the ranks.

    Raises:
        ConfigError: A function, endpoint, model or cache cannot be used; names the term.
    """
    store, role = _store(source.cache), role or FrozenRoleConfig()
    if not source.terms:
        return _cached(_one(source, role), store)
    return WeightedRewards({name: (term.weight, _term(name, term, role, store)) for name, term in source.terms.items()})


def load_learned(path: str) -> LearnedReward:
    """The reward model of a folder or hub name, with its own tokenizer."""
    return LearnedReward(load_scalar(path), load_tokenizer(path))


def load_model_reward(source: RewardTermConfig) -> Reward:
    """The reward of a term that has a model, with the model, in float32 on the CPU."""
    return load_learned(str(source.path)) if source.classifier is None else load_classifier(source.classifier)


def _term(name: str, term: RewardTermConfig, role: FrozenRoleConfig, store: Store | None) -> Reward:
    try:
        return _cached(_one(term, role), store)
    except ConfigError as error:
        raise ConfigError(f"reward.terms.{name}: {error}") from error


def _one(source: RewardTermConfig, role: FrozenRoleConfig) -> Reward:
    if source.asks_a_model:
        return ServedReward(source, role.device) if role.separate else load_model_reward(source)
    if source.url is not None:
        limits = source.timeout_seconds, source.retries
        return RemoteReward(source.url, source.token_variable, *limits, source.send_fields)
    if source.function is not None:
        return RewardFunction(load_reward_function(source.function), source.timeout_seconds)
    if source.verify is not None:
        return VERIFIERS[source.verify](source.answer_key, source.timeout_seconds)
    if source.format is not None:
        return FormatReward(source.format, source.timeout_seconds)
    return RepetitionPenalty(source.ngram)


def _store(cache: bool | str) -> Store | None:
    if isinstance(cache, str):
        return FileStore(cache)
    return MemoryStore() if cache else None


def _cached(reward: Reward, store: Store | None) -> Reward:
    """Behind the cache, where there is one and it has use; reward models in engines must be asked on every rank."""
    # Those of a folder are asked for everything in a process of their own, too: their figures are then the same.
    in_engine = reward.models or (isinstance(reward, ServedReward) and reward.source.classifier is None)
    return reward if store is None or in_engine or isinstance(reward, CHEAP) else CachedReward(reward, store)


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
