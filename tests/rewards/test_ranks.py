"""Rewards on several ranks: reward models that are sharded, and terms at which one rank fails alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hybrid import PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import RewardError
from lightning_hybrid.models import ScalarModel
from lightning_hybrid.modules.roles import scalar_from_policy
from lightning_hybrid.rewards import LearnedReward, RewardFunction, WeightedRewards
from tests.helpers import SHARD_EVERYTHING, quiet_trainer, tiny_policy


def reward_model(seed: int) -> ScalarModel:
    model = scalar_from_policy(tiny_policy(seed))
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.model.score.weight)
    return model


def terms(fails_on: int | None = None) -> WeightedRewards:
    tokenizer = build_tokenizer()

    def length(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
        if fails_on == int(os.environ.get("RANK", 0)):
            raise ValueError("no judge here")
        return [len(response) + float(gold) for response, gold in zip(responses, answer, strict=True)]

    return WeightedRewards(
        {
            "taste": (0.5, LearnedReward(reward_model(3), tokenizer)),
            "length": (0.1, RewardFunction(length)),
            "manners": (2.0, LearnedReward(reward_model(4), tokenizer)),
        }
    )


def module(reward: WeightedRewards) -> PPOModule:
    return PPOModule(
        tiny_policy(), reward, PPOConfig(micro_batch_size=4), RolloutConfig(max_new_tokens=4), build_tokenizer()
    )


def prompts() -> DataLoader[Any]:
    text = "mia visits the market ."
    batch = {
        "prompts": [text] * 4,
        "prompt_ids": [[1, *build_tokenizer()(text)["input_ids"]]] * 4,
        "fields": {"answer": ["1", "2", "3", "4"]},
    }
    return DataLoader([batch] * 2, batch_size=None)


class Watching(PPOModule):
    """Compares the scores of each batch with those of whole models on this rank."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        told = [(text, rollout) for text, rollout in self.reward.told]  # type: ignore[attr-defined]
        for (texts, responses, fields), scores in told:
            expected = terms()(texts, responses, fields)
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
        print("compared", len(told), "weights", sorted(name for name, _ in self.named_children()))


class Telling(WeightedRewards):
    """Keeps what it was asked and what it answered."""

    def __init__(self, reward: WeightedRewards) -> None:
        super().__init__({name: (reward.weights[name], term) for name, term in reward.terms.items()})
        self.told: list[Any] = []

    def prepare(self, prompts: list[str], responses: list[str], fields: Any = None) -> Any:
        self.asked = prompts, responses, fields
        return super().prepare(prompts, responses, fields)

    def conclude(self, ran: Any) -> Any:
        scores = super().conclude(ran)
        self.told.append((self.asked, scores))
        return scores


def train_sharded() -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    from lightning_hybrid.strategy import HybridDeepSpeedStrategy

    ppo = Watching(
        tiny_policy(),
        Telling(terms()),
        PPOConfig(micro_batch_size=4),
        RolloutConfig(max_new_tokens=4),
        build_tokenizer(),
    )
    strategy = HybridDeepSpeedStrategy(stage=3, config=SHARD_EVERYTHING)
    quiet_trainer(strategy, devices=2, max_steps=2).fit(ppo, prompts())


@pytest.mark.slow
def test_two_sharded_reward_models_and_a_function_score_as_whole_ones_do(run_ranks: Any) -> None:
    for output in run_ranks(train_sharded, 2, timeout=200):
        assert "compared 2 weights" in output
        assert "'reward_model_manners', 'reward_model_taste'" in output


def train_with_a_failing_rank() -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    try:
        quiet_trainer("hybrid_deepspeed", devices=2, max_steps=1).fit(module(terms(fails_on=1)), prompts())
    except RewardError as error:
        print("stopped:", str(error).replace("\n", " "), "together:", error.on_every_rank)


@pytest.mark.slow
def test_a_term_that_fails_on_one_rank_stops_all_together(run_ranks: Any) -> None:
    for output in run_ranks(train_with_a_failing_rank, 2, timeout=200):
        assert "the reward failed on 1 of 2 ranks:   rank 1: term 'length': reward" in output
        assert "raised ValueError: no judge here" in output
        assert "together: True" in output


def test_columns_reach_the_terms_and_their_scores_add_up() -> None:
    reward = terms()
    ppo = module(reward)
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=1)
    trainer.fit(ppo, prompts())
    total = 0.5 * reward.last_terms["taste"] + 0.1 * reward.last_terms["length"] + 2.0 * reward.last_terms["manners"]
    torch.testing.assert_close(ppo.raw_scores.float(), total)
    assert {name for name, _ in ppo.named_children()} >= {"reward_model_taste", "reward_model_manners"}
