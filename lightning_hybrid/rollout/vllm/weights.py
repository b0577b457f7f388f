"""The trained weights as vLLM loads them: whole, by their published names, a layer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.models import base_of
from lightning_hybrid.models.merging import Entry, as_published, merged_entries, published_config


class WeightStream:
    """Name and tensor of each weight, once; adapters are merged on the way.

    vLLM keeps what it was given until a layer is complete, and copies it then. So weights come layer by layer, each
    layer gathered from its ZeRO-3 shards at once into memory of its own, which is free again when vLLM has copied it:
    beyond the engine's own weights there is never more than one layer whole. All ranks go through all layers together.

    Args:
        model: the causal LM that is trained, or peft's around it.

    Attributes:
        config: of the model that they are the weights of.
        shapes: of each, by name.
        announced: name, dtype and shape of each, in their order, as JSON can carry them.
        bytes: of all of them.

    Raises:
        RolloutError: for adapters that cannot be merged, or a family that vLLM knows with other tensors.
    """

    def __init__(self, model: Any) -> None:
        base = base_of(model)
        entries = merged_entries(model)
        published = as_published(base, entries)
        if published is None:
            raise RolloutError(
                f"rollout.backend=vllm cannot load {type(base).__name__}: transformers holds it in other tensors than "
                "it is published with; use rollout.backend=native or hf"
            )
        self.config = published_config(base, {entry.name for entry in published})
        self.shapes = {entry.name: entry.shape for entry in published}
        self.announced = [(e.name, str(e.dtype).removeprefix("torch."), list(e.shape)) for e in published]
        self.bytes = sum(entry.bytes for entry in published)
        self._layers = [list(group) for _, group in groupby(published, key=_layer_of)]
        self._iterator = self._weights()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._iterator

    def drain(self) -> None:
        """Go through what nobody asked for: the other ranks do, and wait for this one's shards."""
        for _ in self._iterator:
            pass

    @torch.no_grad()
    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self._layers:
            with _whole([part for entry in layer for part in entry.parts]) as sharded:
                # What is gathered is given back; what is not is the trained tensor itself, which nobody writes to now.
                values = [_value(entry, copied=sharded) for entry in layer]
            names = [entry.name for entry in layer]
            while names:
                yield names.pop(0), values.pop(0)


def version_of(engine: Any, model: Any) -> object:
    """What tells weights from those of another time; None for a bare model, of which nothing tells.

    Args:
        engine: that trains, or the bare model.
        model: the causal LM in it.
    """
    if engine is model:
        return None
    off = any(getattr(layer, "disable_adapters", False) for layer in model.modules())
    return id(engine), engine.global_steps, off


def refuse_others(given: dict[str, tuple[int, ...]], started_for: dict[str, tuple[int, ...]]) -> None:
    """Refuse the weights of a model that engines were not started for.

    Args:
        given: shapes by name.
        started_for: the same of the model that they were started for.

    Raises:
        RolloutError: naming one that differs.
    """
    if given == started_for:
        return
    differing = sorted(name for name, _ in started_for.items() ^ given.items())
    raise RolloutError(
        f"vLLM was started for a model of another architecture: {differing[0]!r} and {len(differing) - 1} others "
        "differ; a reference of another one than the policy's (model.reference) needs rollout.backend=native or hf"
    )


def refuse_missing(names: Collection[str]) -> None:
    """Refuse that vLLM took weights, and passed over some of its own.

    Args:
        names: of those.

    Raises:
        RolloutError: if there are any.
    """
    if names:
        raise RolloutError(
            f"vLLM left {len(names)} of its weights as they were, such as {min(names)!r}: it knows the model by other "
            "names; use rollout.backend=native or hf"
        )


def _layer_of(entry: Entry) -> str:
    """The name up to its first number, such as `model.layers.3`; the whole name for what is in no layer."""
    parts = entry.name.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: at + 1])


def _value(entry: Entry, copied: bool) -> Tensor:
    value = entry.value(lambda part: part.detach())
    assert value is not None
    shared = any(value.data_ptr() == part.data_ptr() for part in entry.parts)
    return value.clone() if copied and shared else value


@contextmanager
def _whole(parts: Sequence[Tensor]) -> Iterator[bool]:
    """Hold these tensors whole; whether any of them is a ZeRO-3 shard otherwise."""
    if not any(hasattr(part, "ds_id") for part in parts):
        yield False
        return
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Small ones are whole all the time.
    sharded = [part for part in parts if getattr(part, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
    with deepspeed.zero.GatheredParameters(sharded):
        yield True
