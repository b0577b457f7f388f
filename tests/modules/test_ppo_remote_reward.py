"""PPO whose scores come from an HTTP endpoint: it trains, and when the endpoint fails for good, every rank stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_hybrid import PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import RewardError
from lightning_hybrid.rewards import RemoteReward, RewardFunction
from tests.helpers import quiet_trainer, tiny_policy
from tests.rewards.endpoints import body, lengths, serving


def ppo_with(reward: Any) -> PPOModule:
    config = PPOConfig(micro_batch_size=4)
    return PPOModule(tiny_policy(), reward, config, RolloutConfig(max_new_tokens=4), build_tokenizer())


def fit(ppo: PPOModule, devices: int = 1, steps: int = 1) -> dict[str, Any]:
    text = "mia visits the market ."
    batch = {"prompts": [text] * 4, "prompt_ids": [[1, *build_tokenizer()(text)["input_ids"]]] * 4}
    prompts: DataLoader[Any] = DataLoader([batch] * 4, batch_size=None)
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=steps, devices=devices)
    trainer.fit(ppo, prompts)
    return dict(trainer.callback_metrics)


def test_scores_of_an_endpoint_enter_the_training_and_a_hiccup_does_not_stop_it() -> None:
    with serving(body("starting", 503), lengths) as server:
        metrics = fit(ppo_with(RemoteReward(server.url, retries=1)), steps=2)
    assert len(server.requests) == 3
    scores = [len(response) for response in server.requests[-1][0]["responses"]]
    assert float(metrics["reward/score"]) == pytest.approx(sum(scores) / 4)


def test_a_reward_that_has_its_limits_already_is_taken_as_it_is() -> None:
    for reward in (RemoteReward("https://scores.example"), RewardFunction(lambda p, r: [0.0] * len(r), 5.0)):
        assert ppo_with(reward).reward is reward


def each_rank_has_its_endpoint(*urls: str) -> None:
    """Entry point of a rank."""
    torch.set_num_threads(1)
    import os

    try:
        fit(ppo_with(RemoteReward(urls[int(os.environ["RANK"])], retries=1)), devices=len(urls))
    except RewardError as error:
        print("stopped:", str(error).replace("\n", " "), "together:", error.on_every_rank)


def test_an_endpoint_that_fails_for_one_rank_stops_all_together(run_ranks: Any) -> None:
    with serving(lengths) as good, serving(body("disk full", 500)) as bad:
        outputs = run_ranks(each_rank_has_its_endpoint, 2, good.url, bad.url, timeout=90)
    for output in outputs:
        assert f"the reward failed on 1 of 2 ranks:   rank 1: reward endpoint {bad.url} gave no scores" in output
        assert "in 2 tries" in output
        assert "status 500; the answer begins 'disk full'" in output
        assert "together: True" in output
    assert len(bad.requests) == 2
