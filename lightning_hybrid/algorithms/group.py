"""What the algorithms without a critic have in common that compare the responses to one prompt with each other."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from lightning_hybrid.algorithms.judged import Credit, Judged
from lightning_hybrid.algorithms.online import OnlineConfig
from lightning_hybrid.rl import group_advantages

GroupSize = Annotated[int, Field(ge=2)]


class GroupConfig(OnlineConfig):
    """An algorithm whose advantages are differences within groups of responses to the same prompt."""

    kind: ClassVar[str] = "grpo"
    """of the comparison, see :func:`~lightning_hybrid.rl.group_advantages`"""

    group_size: GroupSize = 8
    """responses sampled to each prompt, which are compared with each other"""
    groups: PositiveInt | None = None
    """groups that one iteration learns from on each rank: further prompts of the batch are sampled in place of those \
whose responses all scored the same (dynamic sampling, Yu et al. 2025, "DAPO", section 3.2); null for all prompts"""

    def credit(self, judged: Judged) -> Credit:
        """Every token of a response gets what the response is worth beside the others to its prompt."""
        rewards = judged.token_rewards(self.reward_clip)
        advantages = group_advantages(rewards.sum(1), judged.group, self.kind)
        return Credit(rewards, judged.on_tokens(advantages))
