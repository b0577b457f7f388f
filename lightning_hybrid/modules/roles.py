"""The models of PPO in their roles, from whatever the user has: a path, a hub name, a module or a function."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_hybrid.config import PPOConfig
from lightning_hybrid.data import check_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy, ScalarModel, load_policy, load_scalar, load_tokenizer
from lightning_hybrid.rewards import LearnedReward, RemoteReward, RewardCallable, RewardFunction
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
    reward: RewardCallable | ScalarModel | str | Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[ScalarModel | None, RewardFunction | RemoteReward | LearnedReward]:
    """The reward model, if the reward is one, and what scores texts.

    Args:
        reward: a function, an endpoint, a reward model, or its path; a path brings its own tokenizer.
        tokenizer: of a reward model given as a module.
    """
    if isinstance(reward, str | Path):
        model = load_scalar(reward)
        return model, LearnedReward(model, load_tokenizer(reward))
    if isinstance(reward, ScalarModel):
        return reward, LearnedReward(reward, tokenizer)
    return None, reward if isinstance(reward, RewardFunction | RemoteReward) else RewardFunction(reward)


def make_critic(
    source: ScalarModel | str | Path | None,
    reward: RewardFunction | RemoteReward | LearnedReward,
    actor: Policy,
    tokenizer: PreTrainedTokenizerBase,
) -> ScalarModel:
    """What was given; else a copy of the reward model where it reads the policy's tokens; else the actor's trunk."""
    if isinstance(source, ScalarModel):
        return source
    if source is not None:
        return load_scalar(source)
    if isinstance(reward, LearnedReward) and reward.tokenizer.get_vocab() == tokenizer.get_vocab():
        return copy.deepcopy(reward.model)
    return scalar_from_policy(actor)


def scalar_from_policy(policy: Policy) -> ScalarModel:
    """A critic with a copy of the policy's trunk and a head of zeros."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(policy.model.base_model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return ScalarModel(model)


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


def make_kl_controller(config: PPOConfig) -> KLController:
    """A fixed coefficient, or an adaptive one where ``kl_target`` is set."""
    if config.kl_target is None:
        return FixedKLController(config.kl_coef)
    return AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
