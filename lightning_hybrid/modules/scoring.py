"""Scores of responses, from a reward that one rank may fail at alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_hybrid.engines import is_sharded
from lightning_hybrid.engines.agreement import of_all_ranks, on_every_rank
from lightning_hybrid.modules.text import decode_responses
from lightning_hybrid.rl import RunningMoments, moments
from lightning_hybrid.rollout import Rollout

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


def reward_scores(
    module: PPOModule, prompts: list[str], rollout: Rollout, fields: Mapping[str, Sequence[object]] | None = None
) -> Tensor:
    """The reward's own numbers, ``[batch]`` float32; a rank whose reward fails stops every rank.

    Args:
        module: its ``tokenizer``, ``reward`` and ``device`` are used.
        prompts: text of each prompt.
        rollout: the responses to them.
        fields: columns of the data, each with one value per response.

    Raises:
        RewardError: on every rank, if a column is missing or a rank has not one finite score for each response.
    """
    responses, reward = decode_responses(module.tokenizer, rollout), module.reward
    reward.to(module.device)
    together = module.separate.on_every_rank if reward.served else on_every_rank
    if not reward.models:
        return together(lambda: reward(prompts, responses, fields)).to(module.device)
    # What one rank alone can fail at comes before the models' forwards, and after them.
    prepared = together(lambda: reward.prepare(prompts, responses, fields))
    if any(is_sharded(model) for model in reward.models.values()):
        # The other ranks are gathering weights: an agreement now would meet that, not them.
        ran = reward.run(prepared)
    else:
        ran = on_every_rank(lambda: reward.run(prepared))
    return on_every_rank(lambda: reward.conclude(ran)).to(module.device)


def moments_with(module: PPOModule, scores: Tensor) -> RunningMoments:
    """The module's running moments with the scores of all ranks taken in; the module's own stay as they are."""
    merged = copy.copy(module.score_moments)
    for of_rank in of_all_ranks(moments(scores).tolist()):
        merged.update(*of_rank)
    return merged
