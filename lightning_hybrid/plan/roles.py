"""Which models a run has, each defaulting as PPO has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.config.reward import ClassifierConfig, RewardTermConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.adapter_folder import base_of_adapter, is_adapter_folder
from lightning_hybrid.models.loading import why_not_loaded
from lightning_hybrid.plan.networks import Network


def networks_of(run: PlanRun, dtype: torch.dtype) -> dict[str, Network]:
    """The models by name: the actor, and critic, reference and reward models where there are any."""
    actor = Network("actor", _policy_config(run), False, dtype, run.model.adapter, run.roles.actor)
    rewards = list(_rewards(run, dtype))
    networks = [actor]
    if run.algorithm.critic:
        config = _critic_config(run, actor, rewards)
        networks.append(Network("critic", config, True, dtype, run.model.critic_adapter, run.roles.critic))
    if run.algorithm.reference and run.model.reference is not None:
        networks.append(Network("reference", _read_config(run.model.reference), False, dtype))
    elif run.algorithm.reference and run.model.adapter is None:  # else the actor, its adapters off, is the reference
        networks.append(Network("reference", actor.config, False, dtype))
    return {network.name: network for network in [*networks, *rewards]}


def _policy_config(run: PlanRun) -> Any:
    from transformers import AutoConfig

    if run.model.architecture is None:
        return _read_config(str(run.model.path))
    arguments = dict(run.model.architecture)
    return AutoConfig.for_model(arguments.pop("model_type"), **arguments)


def _critic_config(run: PlanRun, actor: Network, rewards: list[Network]) -> Any:
    """What was given; else that of the one reward model, if it reads the policy's tokens; else the policy's.

    Tokenizers are not read: vocabularies of one size are taken for the same.
    """
    if run.model.critic is not None:
        return _read_config(run.model.critic)
    alone = rewards[0] if rewards and not run.reward.terms else None
    if alone is not None and alone.scalar and _vocabulary(alone.config) == _vocabulary(actor.config):
        return alone.config
    return actor.config


def _rewards(run: PlanRun, dtype: torch.dtype) -> Iterator[Network]:
    """Reward models and classifiers, alone or of terms; other rewards take no memory of the device."""
    terms: dict[str, RewardTermConfig] = {f"reward_{name}": term for name, term in run.reward.terms.items()}
    for name, term in (terms or {"reward": run.reward}).items():
        if term.path is not None:
            yield Network(name, _read_config(term.path), True, dtype)
        elif term.classifier is not None:
            yield _classifier(name, term.classifier, dtype)


def _classifier(name: str, term: ClassifierConfig, dtype: torch.dtype) -> Network:
    """A decoder's one logit comes from an engine; others are whole on every rank, in float32."""
    whole = Network(name, _read_config(term.path), False, torch.float32, replicated=True, texts=term.batch_size)
    of_a_decoder = isinstance(getattr(whole.module, "score", None), nn.Linear) and whole.config.num_labels == 1
    if of_a_decoder and term.output == "logit":
        return Network(name, whole.config, True, dtype, texts=term.batch_size)
    return whole


def _vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _read_config(path: str) -> Any:
    """The configuration in a folder or on the hub, of an adapter its base's; nothing else is fetched."""
    from transformers import AutoConfig

    if is_adapter_folder(path):  # which is merged into its base
        path = base_of_adapter(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(why_not_loaded(path, error)) from error
