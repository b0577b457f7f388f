"""Rewards that raise, hang, or answer from afar with anything but scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.runs import share_of_warm
from tests.faults.harms import Fault
from tests.faults.ranks import Ended
from tests.faults.trials import RANKS, Laboratory, Setting, Trial, drawn, setting_of
from tests.rewards.endpoints import Handler, Reply, body, dies_midway, serving, silent


def assert_stopped_with_a_checkpoint(trial: Trial, ended: list[Ended], said: str) -> None:
    """Every rank says which one failed and why, and rank 0 where it goes on from."""
    for rank in ended:
        assert rank.code == 1, rank
        assert "RewardError" in rank.err, rank
        assert said in rank.err, rank
    assert f"checkpoint: {trial.place.newest()}" in ended[0].err, ended[0]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [1, 0])
def test_a_reward_that_raises_on_one_rank(failing: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("raises", failing)
    setting = Setting(2) if failing else setting_of(chance)
    with laboratory.trial("reward raises on one rank", tmp_path, setting) as trial:
        ended = trial.run(Fault("fail", "reward", chance.randrange(8), rank=failing))
        assert_stopped_with_a_checkpoint(trial, ended, f"rank {failing}: reward")
        trial.finish()


@pytest.mark.slow
@pytest.mark.parametrize("failing", RANKS)
def test_a_reward_that_hangs_on_one_rank(failing: int, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("hangs", failing)
    with laboratory.trial("reward hangs on one rank", tmp_path, setting_of(chance)) as trial:
        hang = Fault("hang", "reward", chance.randrange(8), rank=failing)
        ended = trial.run(hang, reward={"timeout_seconds": 2.0})
        assert_stopped_with_a_checkpoint(trial, ended, "has not ended after 2 seconds")
        trial.finish()


def shares(handler: Handler) -> None:
    """What the reward function would say."""
    scores = share_of_warm(handler.texts["prompts"], handler.texts["responses"])
    body(json.dumps({"scores": scores}))(handler)


TROUBLE = {
    "500": [body("an error", 500)] * 2,
    "garbage": [body("<html>try later"), body('{"scores": ["NaN"]}')],
    "slow": [silent],
    "dies midway": [dies_midway, body("an error", 503)],
}


@pytest.mark.slow
@pytest.mark.parametrize("how", TROUBLE)
def test_an_endpoint_in_trouble_for_a_while(how: str, laboratory: Laboratory, tmp_path: Path) -> None:
    chance = drawn("endpoint", how)
    good = [shares] * chance.randrange(1, 12)
    with (
        laboratory.trial("reward endpoint in trouble for a while", tmp_path, setting_of(chance)) as trial,
        serving(*good, *TROUBLE[how], shares) as server,
    ):
        trial.finish(reward={"url": server.url, "timeout_seconds": 1.0})
        assert len(server.requests) == 16 + len(TROUBLE[how])


@pytest.mark.slow
@pytest.mark.parametrize("last", [body("an error", 500), body("<html>try later")], ids=["500", "garbage"])
def test_an_endpoint_that_is_gone_for_good(last: Reply, laboratory: Laboratory, tmp_path: Path) -> None:
    with laboratory.trial("reward endpoint gone for good", tmp_path, Setting(1)) as trial:
        with serving(*[shares] * 7, last) as server:
            ended = trial.run(reward={"url": server.url, "timeout_seconds": 1.0, "retries": 1})
        assert_stopped_with_a_checkpoint(trial, ended, "gave no scores in 2 tries")
        trial.finish()
