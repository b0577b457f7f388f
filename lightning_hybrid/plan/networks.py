"""The models of a run, from their Transformers configurations: shapes, and no memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.config import TrainedRoleConfig
from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.containers import FAMILIES, reason_without_container, units
from lightning_hybrid.engines.build import cast_parameters
from lightning_hybrid.models import Policy, ScalarModel, max_positions
from lightning_hybrid.modules.roles import prepare_for_training
from lightning_hybrid.plan.adapted import NF4_BYTES, adapted
from lightning_hybrid.rewards.classifier import usable_positions
from lightning_hybrid.rewards.learned import TEXTS_AT_ONCE

ROLES = ("actor", "critic", "reference", "reward")


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
        name: its role, one of :data:`ROLES`; of reward models of several terms, ``reward_<term>``.
        config: its Transformers configuration.
        scalar: whether it has a scalar head rather than one over the vocabulary.
        dtype: of its weights while a run computes with them.
        adapter: of a model of which nothing else is trained, but a scalar head.
        settings: what training does to its layers.
        replicated: whether it is a classifier that every rank holds whole, without an engine.
        texts: that a reward model reads in one forward pass.
    """

    name: str
    config: Any
    scalar: bool
    dtype: torch.dtype
    adapter: AdapterConfig | None = None
    settings: TrainedRoleConfig = field(default_factory=TrainedRoleConfig)
    replicated: bool = False
    texts: int = TEXTS_AT_ONCE

    @property
    def role(self) -> str:
        """One of :data:`ROLES`."""
        return "reward" if self.name.startswith("reward") else self.name

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for networks of the same shape that train alike."""
        adapter = None if self.adapter is None else self.adapter.model_dump_json()
        trains = self.settings.dropout, self.settings.gradient_checkpointing
        return self.config.to_json_string(), self.scalar, self.dtype, self.replicated, adapter, *trains

    def build(self) -> nn.Module:
        """The module, inside :func:`without_memory`."""
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        # Modules cannot be converted, as peft does, once their tensors have storages that are not there.
        with unset_fake_temporarily(), torch.device("meta"):
            module = self._shaped()
            cast_parameters(module, self.dtype)  # peft makes adapters in fp32, and engines cast them
        return _with_storages(module)

    def _shaped(self) -> nn.Module:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        config = copy.deepcopy(self.config)  # models write into theirs
        if self.replicated:
            config.pad_token_id = 0
            classifier: nn.Module = AutoModelForSequenceClassification.from_config(config, dtype=self.dtype)
            return classifier
        if self.scalar:
            config.num_labels = 1
        auto: Any = AutoModelForSequenceClassification if self.scalar else AutoModelForCausalLM
        model = adapted(auto.from_config(config, dtype=self.dtype), self.adapter)
        module = ScalarModel(model) if self.scalar else Policy(model)
        prepare_for_training(module, self.settings)
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

    @cached_property
    def trained_sizes(self) -> tuple[int, ...]:
        """Elements of each parameter that an optimizer of its engine would step."""
        return tuple(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    @property
    def trained(self) -> int:
        """Elements of them all."""
        return sum(self.trained_sizes)

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """Bytes that an element of each parameter takes: fewer where weights under an adapter are in four bits."""
        packed = self.adapter is not None and self.adapter.quantize is not None
        names = (name for name, _ in self.module.named_parameters())
        return tuple(NF4_BYTES if packed and name.endswith(".base_layer.weight") else self.itemsize for name in names)

    @property
    def unpacked(self) -> int:
        """Bytes of the largest weight that is read out of four bits for its product."""
        sizes = (size for size, width in zip(self.sizes, self.widths, strict=True) if width == NF4_BYTES)
        return max(sizes, default=0) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def positions(self) -> int | None:
        """How many it has; None for no limit."""
        return max_positions(self.config)

    @cached_property
    def readable(self) -> int | None:
        """Tokens that a text may have; None for no limit."""
        return usable_positions(self.module) if self.replicated else self.positions

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


def _with_storages(module: nn.Module) -> nn.Module:
    """The module with tensors of the kind that :func:`without_memory` makes, tied ones still tied."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        held: Any
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = made.setdefault(id(tensor), _like(tensor))
    return module


def _like(tensor: Tensor) -> Any:
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _lists_by_layer(config: Any) -> list[str]:
    """Attributes with an entry for each layer, such as ``layer_types``."""
    return [
        name
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and not name.startswith("_")
    ]
