"""Settings of adapters: small matrices that are trained beside frozen weights."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings


def _targets_are_named(config: AdapterConfig) -> Problem | None:
    if config.target_modules:
        return None
    return Problem("target_modules", "name at least one kind of layer, or give 'all-linear'", "[]")


class AdapterConfig(Settings):
    """An adapter on every linear layer that is named; only it (and a scalar head) is trained.

    LoRA (Hu et al. 2022) adds ``scale · B · A`` to a weight, with ``scale = alpha / r``; rsLoRA (Kalajdzievski 2023)
    has ``scale = alpha / sqrt(r)``; DoRA (Liu et al. 2024) also trains the length of each row of the sum. QLoRA
    (Dettmers et al. 2023) is LoRA over weights that are held in four bits: ``quantize: nf4``.
    """

    rules: ClassVar[tuple[Rule, ...]] = (_targets_are_named,)

    kind: Literal["lora", "rslora", "dora"] = "lora"
    """lora; rslora: scaled for large ranks; dora: directions and lengths apart, and no inference container"""
    r: PositiveInt = 16
    """rank of what is added to a weight"""
    alpha: PositiveInt = 32
    """what is added is scaled by alpha / r, with rslora by alpha / sqrt(r)"""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """share of an adapter's inputs that is dropped while it trains; in PPO it is the role's dropout that counts"""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """names of the linear layers that get one, such as [q_proj, v_proj]; all-linear: all but the head"""
    quantize: Literal["nf4"] | None = None
    """nf4: hold the frozen weights in four bits (QLoRA), which needs bitsandbytes; null: as they are"""
