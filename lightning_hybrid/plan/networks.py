"""The models of a run in their roles, from their Transformers configurations: shapes, and no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lightning_hybrid.config.plan import PlanRun
from lightning_hybrid.containers import FAMILIES, reason_without_container, units
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy, ScalarModel, disable_dropout, max_positions
from lightning_hybrid.models.loading import why_not_loaded


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors made inside have shapes, dtypes and storages of a size, and nothing in them.

    They say that they are on a CPU, so that attention takes the fused path, as it does in training; on the meta device
    it would hold all of its scores.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        yield


@dataclass(frozen=True)
class Network:
    """A model that is not there.

    Attributes:
        role: actor, critic, reference or reward.
        config: its Transformers configuration.
        scalar: whether it has a scalar head rather than one over the vocabulary.
        dtype: of its weights while a run computes with them.
    """

    role: str
    config: Any
    scalar: bool
    dtype: torch.dtype

    @property
    def key(self) -> tuple[str, bool, torch.dtype]:
        """Equal for networks of the same shape."""
        return self.config.to_json_string(), self.scalar, self.dtype

    def build(self) -> nn.Module:
        """The module, inside :func:`without_memory`."""
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        config = copy.deepcopy(self.config)  # models write into theirs
        module: nn.Module
        if self.scalar:
            config.num_labels = 1
            module = ScalarModel(AutoModelForSequenceClassification.from_config(config, dtype=self.dtype))
        else:
            module = Policy(AutoModelForCausalLM.from_config(config, dtype=self.dtype))
        disable_dropout(module)
        return module

    @property
    def module(self) -> Any:
        """Built once for all networks of its shape, to read shapes from."""
        if self.key not in _BUILT:
            with without_memory():
                _BUILT[self.key] = self.build()
        return _BUILT[self.key]

    @property
    def layers(self) -> int:
        """How many it has."""
        return int(self.config.get_text_config().num_hidden_layers)

    def with_layers(self, layers: int) -> Network:
        """The same with its first layers only."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        for name in _lists_by_layer(text):
            setattr(text, name, getattr(text, name)[:layers])
        text.num_hidden_layers = layers
        return replace(self, config=config)

    @cached_property
    def period(self) -> int:
        """After how many layers their kinds repeat."""
        text = self.config.get_text_config()
        kinds = list(zip(*(getattr(text, name) for name in _lists_by_layer(text)), strict=True)) or [()] * self.layers
        return next(p for p in range(1, self.layers + 1) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(parameter.numel() for parameter in self.module.parameters())

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def positions(self) -> int | None:
        """How many it has; None for no limit."""
        return max_positions(self.config)

    @cached_property
    def reason_without_container(self) -> str | None:
        """Why generation cannot read its weights through a container; None where it can."""
        return reason_without_container(self.module.model, 1)

    @cached_property
    def unit_sizes(self) -> list[int]:
        """Elements of the embedding, of each layer, and of the norm and head, as containers fetch them."""
        if self.config.get_text_config().model_type not in FAMILIES:
            return [self.numel]
        return [sum(parameter.numel() for parameter in unit) for unit in units(self.module.model)]


_BUILT: dict[Any, nn.Module] = {}


def _lists_by_layer(config: Any) -> list[str]:
    """Attributes with an entry for each layer, such as ``layer_types``."""
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and not name.startswith("_")
    ]


def networks_of(run: PlanRun, dtype: torch.dtype) -> dict[str, Network]:
    """Actor, critic, reference and, if the reward is a model, reward, each defaulting as PPO has it."""
    actor = Network("actor", _policy_config(run), False, dtype)
    reward = None
    if run.reward.path is not None:
        reward = Network("reward", _read_config(run.reward.path), True, dtype)
    reference = actor.config if run.model.reference is None else _read_config(run.model.reference)
    networks = {
        "actor": actor,
        "critic": Network("critic", _critic_config(run, actor, reward), True, dtype),
        "reference": Network("reference", reference, False, dtype),
    }
    return networks if reward is None else networks | {"reward": reward}


def _policy_config(run: PlanRun) -> Any:
    from transformers import AutoConfig

    if run.model.architecture is None:
        return _read_config(str(run.model.path))
    arguments = dict(run.model.architecture)
    return AutoConfig.for_model(arguments.pop("model_type"), **arguments)


def _critic_config(run: PlanRun, actor: Network, reward: Network | None) -> Any:
    """What was given; else the reward model's where it reads the policy's tokens; else the policy's.

    Tokenizers are not read: vocabularies of one size are taken for the same.
    """
    if run.model.critic is not None:
        return _read_config(run.model.critic)
    if reward is not None and _vocabulary(reward.config) == _vocabulary(actor.config):
        return reward.config
    return actor.config


def _vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _read_config(path: str) -> Any:
    """The configuration in a folder or on the hub; nothing else is fetched."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(why_not_loaded(path, error)) from error
