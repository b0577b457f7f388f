"""Settings of an optimizer, and the kinds of numbers that learning algorithms are set with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from lightning_hybrid.settings import Settings

Schedule = Literal["constant", "cosine", "linear"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
OpenUnit = Annotated[float, Field(gt=0.0, lt=1.0)]
# YAML has lists only, so a pair may be given as one.
Betas = Annotated[tuple[BelowOne, BelowOne], Field(strict=False)]


class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    lr: PositiveFloat = 1e-5
    """peak learning rate"""
    weight_decay: NonNegativeFloat = 0.0
    """decoupled weight decay"""
    betas: Betas = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    warmup_steps: NonNegativeInt = 0
    """optimizer steps of linear warm-up"""
    schedule: Schedule = "constant"
    """shape of the learning rate after the warm-up; cosine and linear end at 0 with the last step"""
