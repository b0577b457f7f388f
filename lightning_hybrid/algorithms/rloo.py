"""REINFORCE with the mean of the other responses as the baseline."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lightning_hybrid.algorithms.group import GroupConfig, GroupSize
from lightning_hybrid.algorithms.optimizer import Aggregation


class RLOOConfig(GroupConfig):
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024): the KL is part of a response's reward.

    With one epoch and one minibatch, where every ratio is 1, the clipped loss has the gradient of REINFORCE.
    """

    kind: ClassVar[str] = "rloo"

    name: str = "rloo"
    """which algorithm this is"""
    group_size: GroupSize = Field(default=4)
    """responses sampled to each prompt, which are compared with each other"""
    aggregation: Aggregation = "seq_mean_token_sum"
    """how token losses become one number"""
