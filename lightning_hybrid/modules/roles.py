"""The models of PPO in their roles, from whatever the user has: a path, a hub name, a module or a function."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hybrid.algorithms import OnlineConfig
from lightning_hybrid.config import FrozenRoleConfig, RewardSourceConfig, TrainedRoleConfig
from lightning_hybrid.data import PromptDataModule, check_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import (
    Policy,
    ScalarModel,
    load_policy,
    load_scalar,
    load_tokenizer,
    scalar_from_policy,
    set_dropout,
)
from lightning_hybrid.models.adapters import AdaptersOff, has_adapter
from lightning_hybrid.modules.reference import ServedReference
from lightning_hybrid.rewards import (
    CachedReward,
    LearnedReward,
    Reward,
    RewardCallable,
    RewardFunction,
    ServedReward,
    check_fields,
    load_model_reward,
    reward_from,
)
from lightning_hybrid.rl import AdaptiveKLController, FixedKLController, KLController

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_policy(source: Policy | str | Path, tokenizer: PreTrainedTokenizerBase, chunk: int) -> Policy:
    """An actor or a reference.

    Raises:
        DataError: if the tokenizer has ids that the embedding has not.
    """
    policy = source if isinstance(source, Policy) else load_policy(source, chunk)
    check_tokenizer(tokenizer, policy.config.get_text_config().vocab_size)
    return policy


def make_reward(
    reward: Reward | RewardCallable | ScalarModel | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    role: FrozenRoleConfig | None = None,
) -> tuple[dict[str, ScalarModel], Reward]:
    """The reward models by the names of the children that they become, and what scores texts.

    A reward model alone is ``reward_model``; those of several terms are ``reward_model_<term>``.

    Args:
        reward: any :class:`~lightning_hybrid.rewards.Reward`, a function, a reward model, or its path; a path brings
            its own tokenizer.
        tokenizer: of a reward model given as a module.
        role: says where a reward model given as a path is; by default in the ranks.

    Raises:
        ConfigError: if it is to be in a process of its own, and is given as something else than a path.
    """
    separate = role is not None and role.separate
    if isinstance(reward, str | Path):
        reward = reward_from(RewardSourceConfig(path=str(reward)), role)
    elif isinstance(reward, ScalarModel):
        reward = LearnedReward(reward, tokenizer)
    elif not isinstance(reward, Reward):
        reward = RewardFunction(reward)
    if separate and not reward.served:
        raise ConfigError(
            f"roles.reward.separate: a process of its own reads a reward model from a folder, and reward is "
            f"{reward.name!r}, which is here already: give the folder's path, or leave it out"
        )
    models = {f"reward_model_{term}" if term else "reward_model": model for term, model in reward.models.items()}
    return models, reward


def check_columns(reward: Reward, data: Any) -> None:
    """Refuse, before training and on all ranks, a reward that asks for a column which some of the data has nowhere.

    Args:
        reward: any.
        data: what the trainer was given; other than a :class:`~lightning_hybrid.data.PromptDataModule` that has been
            set up, it does not tell.

    Raises:
        ConfigError: naming the column and the file.
    """
    for source, columns in data.columns.items() if isinstance(data, PromptDataModule) else ():
        check_fields(reward, columns, source)


def make_critic(
    source: ScalarModel | str | Path | None,
    reward: Reward,
    actor: Policy,
    tokenizer: PreTrainedTokenizerBase,
) -> ScalarModel:
    """What was given; else a copy of the reward model where it reads the policy's tokens; else the actor's trunk."""
    if isinstance(source, ScalarModel):
        return source
    if source is not None:
        return load_scalar(source)
    if isinstance(reward, CachedReward):  # of a classifier in a process of its own, whose scores can be kept
        reward = reward.reward
    if isinstance(reward, ServedReward):
        reward = load_model_reward(reward.source)  # whose weights are the critic's to begin with
    if isinstance(reward, LearnedReward) and reward.tokenizer.get_vocab() == tokenizer.get_vocab():
        return copy.deepcopy(reward.model)
    return scalar_from_policy(actor)


def tokenizer_beside(model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        ConfigError: if the model was given as a module.
    """
    if not isinstance(model, str | Path):
        raise ConfigError(
            "tokenizer is required where the model is given as a module: there is no folder to read it from"
        )
    return load_tokenizer(model)


def make_reference(
    config: OnlineConfig,
    source: Policy | str | Path | None,
    actor: Policy,
    tokenizer: PreTrainedTokenizerBase,
    given: Policy | str | Path,
    role: FrozenRoleConfig,
) -> Policy | AdaptersOff | ServedReference | None:
    """What was given; else the actor as it starts: its base, or a copy; None where the algorithm keeps no reference.

    Args:
        config: of the algorithm.
        source: of the reference, if it is another one than the actor's.
        actor: that it is the reference of.
        tokenizer: of both.
        given: what the actor was made from.
        role: says where the reference is.

    Raises:
        ConfigError: if it is to be in a process of its own, and cannot be.
    """
    if role.separate:
        return _served_reference(config, source, actor, given, role)
    if not config.reference:
        return None
    if source is not None:
        return make_policy(source, tokenizer, config.logprob_chunk)
    return AdaptersOff(actor) if has_adapter(actor) else copy.deepcopy(actor)


def _served_reference(
    config: OnlineConfig,
    source: Policy | str | Path | None,
    actor: Policy,
    given: Policy | str | Path,
    role: FrozenRoleConfig,
) -> ServedReference:
    folder = given if source is None else source
    if not config.reference:
        reason = f"{type(config).__name__} has reference=False: set it, or leave this out"
    elif source is None and has_adapter(actor):
        reason = "the actor with its adapters off is the reference, which takes no memory: leave it out"
    elif isinstance(folder, str | Path):
        return ServedReference(str(folder), role.device)
    else:
        reason = "a process of its own reads the model from a folder, and it is a module: give reference as a path"
    raise ConfigError(f"roles.reference.separate: {reason}")


def check_given(config: OnlineConfig, of_critic: Mapping[str, Any], reference: Any, ptx: Any) -> None:
    """Refuse what an algorithm has no use for, and the lack of what it needs.

    Args:
        config: of the algorithm.
        of_critic: arguments about a critic, by name; None, or settings as they are by default, where not given.
        reference: as given.
        ptx: as given.

    Raises:
        ConfigError: naming the argument and the setting.
    """
    for name, value in of_critic.items():
        if value not in (None, TrainedRoleConfig()) and not config.critic:
            raise ConfigError(f"{name} was given, but {config.name!r} has no critic: leave it out, or use PPOConfig")
    if reference is not None and not config.reference:
        raise ConfigError(
            f"reference was given, but {type(config).__name__} has reference=False: set it, or leave it out"
        )
    if (ptx is None) != (config.ptx_coef == 0):
        given = "ptx has no effect" if ptx is not None else "the PTX loss needs ptx, its texts,"
        raise ConfigError(f"{given} with ptx_coef={config.ptx_coef:g}")


def prepare_for_training(model: Policy | ScalarModel, role: TrainedRoleConfig) -> None:
    """Set a model's dropout, and whether it computes activations twice."""
    set_dropout(model, role.dropout)
    if role.gradient_checkpointing:
        # The other kind needs an input that requires gradients, which token ids do not.
        inner = model.model
        # The second name is the older one.
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def make_kl_controller(config: OnlineConfig) -> KLController:
    """A fixed coefficient, or an adaptive one where ``kl_target`` is set."""
    if config.kl_target is None:
        return FixedKLController(config.kl_coef)
    return AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
