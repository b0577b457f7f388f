"""Reward models in processes of their own: the scores and the tokens of the same model in a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hybrid.config import ClassifierConfig, FrozenRoleConfig, RewardSourceConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import RewardError, ServerError
from lightning_hybrid.models import scalar_from_policy
from lightning_hybrid.rewards import CachedReward, ClassifierReward, Reward, ServedReward, reward_from
from lightning_hybrid.serving import RunningServer, ServerClient, close_all, start_servers
from tests.helpers import tiny_policy
from tests.rewards.classifiers import CHAT, save_classifier

SEPARATE = FrozenRoleConfig(separate=True)
PROMPTS = ["mia visits the market .", "tom", "the soup was warm and good"]
RESPONSES = ["the soup was good", "reads what mia wrote and a cold day", ""]
TURNS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


@contextmanager
def running(reward: Reward) -> Iterator[Sequence[RunningServer]]:
    """Its processes, which it asks."""
    servers = start_servers([part.spec(torch.float32) for part in reward.served])
    clients = [ServerClient(server.url, server.token, "the reward model", 60.0) for server in servers]
    for part, client in zip(reward.served, clients, strict=True):
        part.connect(client)
    try:
        yield servers
    finally:
        for client in clients:
            client.close()
        close_all(servers)


def test_its_scores_are_those_of_the_same_models_in_the_rank(tmp_path: Path) -> None:
    model = scalar_from_policy(tiny_policy(3))
    torch.nn.init.normal_(model.model.score.weight)
    model.model.save_pretrained(tmp_path / "taste")
    build_tokenizer().save_pretrained(tmp_path / "taste")
    mood = {"path": save_classifier(tmp_path / "mood", chat=CHAT), "label": "positive", "output": "log_odds"}
    terms: dict[str, Any] = {
        "taste": {"path": str(tmp_path / "taste"), "weight": 0.5},
        "mood": {"classifier": mood | {"template": "chat"}, "weight": 2.0},
        "loops": {"penalty": "repetition"},
    }
    here = reward_from(RewardSourceConfig(terms=terms))
    served = reward_from(RewardSourceConfig(terms=terms), SEPARATE)
    assert (len(served.served), served.models, served.replicas) == (2, {}, ())
    fields = {"prompt_turns": TURNS, "unrelated": [object()] * 3}
    with running(served):
        scores = served(PROMPTS, RESPONSES, fields)
        with pytest.raises(RewardError, match=r"term 'mood': .* status 400: RewardError: sample 0 has .* 32 positions"):
            served(["mia"], ["mia " * 40], {"prompt_turns": TURNS[:1]})
    torch.testing.assert_close(scores, here(PROMPTS, RESPONSES, fields), atol=1e-5, rtol=1e-5)
    assert len(set(scores.tolist())) == 3
    assert served.figures.keys() == here.figures.keys()
    for name, values in here.figures.items():
        torch.testing.assert_close(served.figures[name], values, atol=1e-5, rtol=1e-5)


def test_one_that_is_not_running_says_so() -> None:
    reward = reward_from(RewardSourceConfig(path="/models/taste"), SEPARATE)
    assert isinstance(reward, ServedReward)
    with pytest.raises(RewardError, match="the reward model '/models/taste' has no process yet"):
        reward(["a"], ["b"])
    reward.connect(ServerClient("http://127.0.0.1:9", "token", "the reward model", 5.0))
    with pytest.raises(ServerError, match="the reward model at http://127.0.0.1:9 was lost at /score"):
        reward(["a"], ["b"])


def test_a_cache_knows_a_classifier_again_wherever_it_runs(tmp_path: Path) -> None:
    source = RewardSourceConfig(classifier={"path": save_classifier(tmp_path / "mood"), "label": 0}, cache=True)  # type: ignore[arg-type]
    here, served = reward_from(source), reward_from(source, SEPARATE)
    assert isinstance(here, CachedReward)
    assert isinstance(here.reward, ClassifierReward)
    assert isinstance(served, CachedReward)
    assert here.identity() == served.identity()
    assert "negative" not in served.identity()
    turns = {"prompt_turns": TURNS}
    assert here.columns_read(turns) == served.columns_read(turns) == frozenset()  # its template has no turns
    other = source.model_copy(update={"classifier": ClassifierConfig(path=here.reward.config.path, label=1)})
    assert reward_from(other, SEPARATE).identity() != served.identity()
