"""Scores of responses, from a reward that one rank may fail at alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lightning_hybrid.engines import is_sharded
from lightning_hybrid.engines.agreement import agree
from lightning_hybrid.errors import LightningHybridError, RewardError
from lightning_hybrid.modules.text import decode_responses
from lightning_hybrid.rewards import LearnedReward
from lightning_hybrid.rl import RunningMoments
from lightning_hybrid.rollout import Rollout

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule

T = TypeVar("T")


def reward_scores(module: PPOModule, prompts: list[str], rollout: Rollout) -> Tensor:
    """The reward's own numbers, ``[batch]`` float32; a rank whose reward fails stops every rank."""
    responses, reward = decode_responses(module.tokenizer, rollout), module.reward
    if not isinstance(reward, LearnedReward):
        return on_every_rank(lambda: reward(prompts, responses)).to(module.device)
    # What one rank alone can fail at comes before the model's forward.
    ids = on_every_rank(lambda: reward.encode(prompts, responses))
    if is_sharded(reward.model):
        # The other ranks are gathering weights: an agreement now would meet that, not them.
        return reward.score_ids(ids).to(module.device)
    return on_every_rank(lambda: reward.score_ids(ids)).to(module.device)


def moments_with(module: PPOModule, scores: Tensor) -> RunningMoments:
    """The module's running moments with the scores of all ranks taken in; the module's own stay as they are."""
    scores = scores.double()
    sums = torch.stack([scores.new_tensor(len(scores)), scores.sum(), scores.square().sum()])
    count, total, squares = module._sum_over_ranks(sums).tolist()
    mean = total / count
    moments = copy.copy(module.score_moments)
    moments.update(count, mean, max(squares - count * mean**2, 0.0))
    return moments


def on_every_rank(
    compute: Callable[[], T], what: str = "the reward", error_type: type[LightningHybridError] = RewardError
) -> T:
    """The result of ``compute``; where it fails on one rank, every rank raises."""
    result: T | Exception
    try:
        result = compute()
    except Exception as error:
        result = error
    return agree(result, what, error_type)
