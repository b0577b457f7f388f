"""A model's tensors under the names that Hugging Face knows, adapters merged in or alone; one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.policy import base_of

Read = Callable[[Tensor], Tensor | None]
"""from a tensor of the model, of which a rank may hold a shard only, to all of it; None on ranks that do not want it"""


@dataclass(frozen=True)
class Entry:
    """A tensor as a folder holds it, and what it is made of.

    Attributes:
        name: in the folder.
        shape: of the whole tensor.
        dtype: in the folder.
        parts: tensors of the model; shards at ZeRO-3.
        combine: from the whole parts to the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Tensor, ...]
    combine: Callable[[list[Tensor]], Tensor]

    def value(self, read: Read) -> Tensor | None:
        """The tensor; None where ``read`` gives none. The model's own tensors are not written to."""
        whole = [read(part) for part in self.parts]
        held = [part for part in whole if part is not None]
        return self.combine(held).to(self.dtype) if len(held) == len(whole) else None

    @property
    def bytes(self) -> int:
        """Of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def merged_entries(model: Any) -> list[Entry]:
    """Every tensor of the plain model: adapters that are on are added in float32, and the sum is rounded once.

    Args:
        model: a Hugging Face model, or peft's around one.

    Raises:
        ConfigError: for adapters that cannot be merged, see :func:`reason_not_merged`.
    """
    reason = reason_not_merged(model)
    if reason is not None:
        raise ConfigError(f"the adapters cannot be merged: {reason}")
    base = base_of(model)
    tensors = base.state_dict(keep_vars=True)
    entries = [entry for name in tensors if (entry := _entry(base, name, tensors)) is not None]
    return _without_ties(entries, getattr(base, "all_tied_weights_keys", None) or {})


def adapter_entries(model: Any, adapter: str) -> list[Entry]:
    """The tensors of one adapter, and of modules trained beside it, named as peft names them in a folder."""
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(
        model, state_dict=model.state_dict(keep_vars=True), adapter_name=adapter, save_embedding_layers=False
    )
    return [_plain(name, tensor) for name, tensor in tensors.items()]


def reason_not_merged(model: Any) -> str | None:
    """Why a model's adapters cannot become a part of its weights; None where they can, or there are none."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "a learned prompt is no change of weights"
    reasons = (_reason_of(name, layer) for name, layer in _adapted_layers(base_of(model)))
    return next((reason for reason in reasons if reason is not None), None)


def _reason_of(name: str, layer: Any) -> str | None:
    if not hasattr(layer, "lora_A") or len(layer.lora_embedding_A) or layer.base_layer.weight.ndim > 2:
        return f"{name} has {type(layer).__name__}, which is not LoRA on a linear layer"
    if any(layer.lora_bias.values()):
        return f"{name} has an adapter with a bias"
    if len(layer.active_adapters) > 1:
        return f"{name} has several adapters, {layer.active_adapters}"
    if not layer.base_layer.weight.is_floating_point():
        return f"{name} is quantized, and what it was rounded from is not here"
    return None


def _adapted_layers(base: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in base.named_modules() if hasattr(module, "base_layer"))


def _entry(base: Any, name: str, tensors: dict[str, Tensor]) -> Entry | None:
    """The tensor of that name in the plain model; None for what belongs to an adapter, or was replaced by one."""
    head, found, tail = name.partition(".base_layer.")
    if found:
        layer, plain = base.get_submodule(head), f"{head}.{tail}"
        active = () if layer.disable_adapters else layer.active_adapters
        merges = tail == "weight" and any(key in layer.lora_A for key in active)
        return _merged(plain, layer, tensors[name]) if merges else _plain(plain, tensors[name])
    head, found, tail = name.partition(".modules_to_save.")
    if found:
        (adapter, _, inner), wrapper = tail.partition("."), base.get_submodule(head)
        used = adapter in wrapper.active_adapters and not wrapper.disable_adapters
        return _plain(f"{head}.{inner}", tensors[name]) if used else None
    head, found, tail = name.partition(".original_module.")
    if found:
        return _plain(f"{head}.{tail}", tensors[name]) if base.get_submodule(head).disable_adapters else None
    if ".lora_" in name:
        return None
    return _plain(name, tensors[name])


def _plain(name: str, tensor: Tensor) -> Entry:
    return Entry(name, shape_of(tensor), tensor.dtype, (tensor,), _only)


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _merged(name: str, layer: Any, weight: Tensor) -> Entry:
    (adapter,) = layer.active_adapters
    parts = [weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    if adapter in layer.lora_magnitude_vector:
        parts.append(layer.lora_magnitude_vector[adapter].weight)
    transposed = type(layer.base_layer).__name__ == "Conv1D"
    combine = partial(merged_weight, scale=float(layer.scaling[adapter]), transposed=transposed)
    return Entry(name, shape_of(weight), weight.dtype, tuple(parts), combine)


def merged_weight(parts: Sequence[Tensor], scale: float, transposed: bool = False) -> Tensor:
    """A weight with its adapter, in float32 (or in float64 where the weight is).

    Args:
        parts: weight ``[out, in]``, A ``[r, in]``, B ``[out, r]``, and for DoRA (Liu et al. 2024, eq. 5) the lengths of
            the rows, ``[out]``.
        scale: of ``B A``.
        transposed: the weight is ``[in, out]``, as GPT-2's are.
    """
    weight, down, up, *lengths = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
    added = up @ down
    total = weight + (added.T if transposed else added) * scale
    if lengths:
        rows = total.T if transposed else total
        factor = (lengths[0] / torch.linalg.norm(rows, dim=1))[:, None]
        total = (factor.T if transposed else factor) * total
    return total


def shape_of(tensor: Any) -> tuple[int, ...]:
    """A tensor's whole shape, also where it is a ZeRO-3 parameter."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def published_config(base: Any, names: Collection[str]) -> Any:
    """The configuration of a folder, or an engine, with tensors of these names.

    Args:
        base: the model itself, without adapters around it.
        names: of its tensors.
    """
    config = copy.deepcopy(base.config)
    config.dtype = str(base.dtype).removeprefix("torch.")
    config.architectures = [type(base).__name__]
    if any(name in names for name in getattr(base, "all_tied_weights_keys", None) or {}):
        # An adapter on the head has set it apart.
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    return config


def as_published(model: Any, entries: list[Entry]) -> list[Entry] | None:
    """The entries under the names that the model's family is published with; None where tensors differ, too.

    Transformers builds some families (mixtures of experts above all) from other tensors than their folders hold.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {entry.name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for entry in entries}
    names = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(shapes)).items()}
    if names.keys() != {id(tensor) for tensor in shapes.values()}:
        return None
    return [replace(entry, name=names[id(shapes[entry.name])]) for entry in entries]


def _without_ties(entries: list[Entry], tied: dict[str, str]) -> list[Entry]:
    """Each tensor once, under the name that Hugging Face keeps; what an adapter was merged into is no longer tied."""
    kept: dict[object, Entry] = {}
    for entry in entries:
        key: object = entry.name if len(entry.parts) > 1 else id(entry.parts[0])
        if key not in kept or kept[key].name in tied:
            kept[key] = entry
    return list(kept.values())
