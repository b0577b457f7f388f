"""Frozen models in processes of their own: the same numbers as in the ranks, no copy there, and what dies is told."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_hybrid import PPOConfig, PPOModule, RolloutConfig
from lightning_hybrid.config import AdapterConfig, FrozenRoleConfig, RewardSourceConfig, RolesConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import CheckpointError, ConfigError, RewardError, ServerError
from lightning_hybrid.models import with_adapter
from lightning_hybrid.modules.passes import policy_logprobs
from lightning_hybrid.modules.reference import ServedReference
from lightning_hybrid.modules.roles import make_critic
from lightning_hybrid.modules.separate import SeparateRoles
from lightning_hybrid.rewards import CachedReward, LearnedReward, reward_from
from lightning_hybrid.serving import ServerClient, ServerSpec, start_servers
from tests.helpers import quiet_trainer, tiny_policy
from tests.modules.separate import IN_RANKS, SEPARATE, ppo, prompts, save_models

# What depends on time, or on where the models are.
NOT_COMPARED = ("seconds", "throughput", "engine/", "memory/")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


class History(L.Callback):
    """Figures of each iteration and evaluation; and what it is told to do before an iteration."""

    def __init__(self, before: dict[int, Any] | None = None) -> None:
        self.rows: list[dict[str, float]] = []
        self.before = before or {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.before:
            self.before[trainer.global_step](pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._note(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._note(trainer)

    def _note(self, trainer: L.Trainer) -> None:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({k: v for k, v in figures.items() if not k.startswith(NOT_COMPARED) and "seconds" not in k})


def fit(module: PPOModule, steps: int = 3, before: dict[int, Any] | None = None, **arguments: Any) -> History:
    history = History(before)
    schedule = {"max_epochs": -1, "val_check_interval": steps, "check_val_every_n_epoch": None}
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=steps, callbacks=[history], **schedule, **arguments)
    trainer.fit(module, prompts(), prompts(4))
    return history


def processes_of(module: PPOModule) -> list[int]:
    """Process ids of the reward model and the reference, on the first rank."""
    return [server._process.pid for server in module.separate._running]  # type: ignore[attr-defined]


def assert_same(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(rows) == len(expected) > 3
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert row == pytest.approx(other, abs=1e-5, rel=1e-5)


@pytest.fixture(scope="module")
def in_ranks(models: Path) -> list[dict[str, float]]:
    """Figures of the run whose models are in the rank."""
    return fit(ppo(models, IN_RANKS)).rows


def test_a_run_logs_the_same_with_its_frozen_models_in_processes_of_their_own(
    models: Path, in_ranks: list[dict[str, float]]
) -> None:
    own: list[int] = []
    module = ppo(models, SEPARATE)
    rows = fit(module, before={0: lambda running: own.extend(processes_of(running))}).rows
    assert_same(rows, in_ranks)
    assert {"policy/kl", "val/kl", "val/win_rate", "val/score"} <= rows[-1].keys()
    assert rows[-1]["policy/kl"] != 0.0
    assert sorted(name for name, _ in module.named_children()) == ["actor", "critic"]  # no copy here
    assert len(own) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in own)


def kill_all(module: PPOModule) -> None:
    for pid in processes_of(module):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_processes_that_die_once_are_started_again_and_change_nothing(
    models: Path, in_ranks: list[dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    assert_same(fit(ppo(models, SEPARATE), before={1: kill_all}).rows, in_ranks)
    for what in (f"the reward model '{models / 'reward'}'", "the reference"):
        assert f"{what} is started again: its process was killed by SIGKILL" in caplog.text


class Fallible:
    """A process that dies when it is told to."""

    url, token = "http://127.0.0.1:1", ""

    def __init__(self) -> None:
        self.alive = True

    def exited(self) -> str | None:
        return None if self.alive else "killed"

    def close(self) -> None:
        self.alive = False


def test_two_processes_that_die_at_once_are_both_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hybrid.modules.separate.start_servers", lambda specs: [Fallible() for _ in specs])
    roles, first, second = SeparateRoles(), Fallible(), Fallible()
    roles._specs, roles._running = [ServerSpec(what, "", {}) for what in ("first", "second")], [first, second]
    monkeypatch.setattr(roles, "_connect", lambda addresses: None)
    deaths = [second, first]

    def compute() -> str:
        if deaths:
            deaths.pop().alive = False
            raise ServerError("lost")
        return "scores"

    assert roles.on_every_rank(compute) == "scores"
    deaths.append(roles._running[1])  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="second: killed"):
        roles.on_every_rank(compute)


@pytest.mark.slow
def test_a_process_that_dies_again_stops_the_run(models: Path) -> None:
    with pytest.raises(RewardError, match=r"the reward model '.*/reward': its process was killed by SIGKILL"):
        fit(ppo(models, SEPARATE), before={1: kill_all, 2: kill_all})


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_frozen_models_than_it_began_with(models: Path, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=1, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(ppo(models, SEPARATE), prompts())
    others = Path(shutil.copytree(models, tmp_path / "others"))
    shutil.copy(models / "actor" / "model.safetensors", others / "reference")
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=2)
    with pytest.raises(CheckpointError, match="weights of the reference are not those .* as its reference: give"):
        trainer.fit(ppo(others, SEPARATE), prompts(), ckpt_path=keep.best_model_path)


def test_processes_end_when_an_error_ends_the_run(models: Path) -> None:
    module, own = ppo(models, SEPARATE), list[int]()

    def fail(running: PPOModule) -> None:
        own.extend(processes_of(running))
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fit(module, before={1: fail})
    assert len(own) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in own)


def test_log_probs_of_a_real_model_are_those_in_the_rank(shared: Path) -> None:
    folder = str(shared / "models" / "tinystories-656k")
    settings: dict[str, Any] = {"rollout": RolloutConfig(max_new_tokens=12), "config": PPOConfig(micro_batch_size=2)}
    module = PPOModule(folder, lambda p, r: [0.0] * len(r), reference=folder, **settings)
    prompts = [module.tokenizer(text)["input_ids"] for text in ("Once upon a time", "Lily and her dog", "The")]
    drawn = module.backend.generate(module.actor.model, prompts, seed=3)
    expected = policy_logprobs(module.actor.eval(), drawn, 2, 0.7)
    reference = ServedReference(folder, None)
    (server,) = start_servers([reference.spec(module, torch.float32)])
    client = ServerClient(server.url, server.token, "the reference", 60.0)
    reference.connect(client)
    begun = reference.begin(drawn, 2, 0.7)
    torch.testing.assert_close(begun(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(begun(), expected, atol=1e-5, rtol=1e-5)  # asked again
    said = reference.respond(prompts, 0, [0, 1, 2], torch.device("cpu"))
    greedy = module.backend.generate(module.actor.model, prompts, seed=0, greedy=True)
    assert (said.responses, said.prompts) == (greedy.responses, greedy.prompts)
    assert said.finish_reasons == greedy.finish_reasons
    torch.testing.assert_close(said.policy_logprobs, greedy.policy_logprobs, atol=1e-5, rtol=1e-5)
    client.close()
    server.close()


def test_a_model_that_cannot_be_loaded_is_named_before_training(models: Path) -> None:
    module = ppo(models, RolesConfig(reference={"separate": True}))  # type: ignore[arg-type]
    module.reference = ServedReference("/nowhere/reference", None)
    with pytest.raises(ConfigError, match="the reference did not start: model path .* does not exist"):
        fit(module)


def test_a_text_that_the_reward_model_cannot_score_is_refused_in_its_own_words(models: Path) -> None:
    module = ppo(models, RolesConfig(reward={"separate": True}))  # type: ignore[arg-type]
    module.separate.start(_trained_by(module))
    try:
        with pytest.raises(RewardError, match="status 400: RewardError: sample 1 has .* 64 positions"):
            module.reward(["mia", "mia"], ["visits", "visits " * 80])
    finally:
        module.separate.close()


def test_a_critic_starts_from_the_reward_model_wherever_that_is_and_where_its_scores_are_kept(models: Path) -> None:
    source = RewardSourceConfig(classifier={"path": str(models / "reward")}, cache=True)  # type: ignore[arg-type]
    rewards = [reward_from(source, FrozenRoleConfig(separate=separate)) for separate in (False, True)]
    assert [type(reward) for reward in rewards] == [LearnedReward, CachedReward]
    of_rank, of_process = (make_critic(None, reward, tiny_policy(), build_tokenizer()) for reward in rewards)
    for name, values in of_rank.state_dict().items():
        torch.testing.assert_close(of_process.state_dict()[name], values, atol=0.0, rtol=0.0)


def _trained_by(module: PPOModule) -> PPOModule:
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=1)
    module.trainer = trainer
    return module


@pytest.mark.parametrize(
    ("given", "roles", "problem"),
    [
        ({"reward": lambda p, r: [0.0] * len(r)}, {"reward": {"separate": True}}, "give the folder's path"),
        ({}, {"reference": {"separate": True}}, "reads the model from a folder, and it is a module"),
        ({"config": PPOConfig(reference=False, kl_coef=0.0)}, {"reference": {"separate": True}}, "has reference=False"),
        (
            {"actor": lambda: with_adapter(tiny_policy(), AdapterConfig(target_modules=["q_proj"]))},
            {"reference": {"separate": True}},
            "the actor with its adapters off is the reference",
        ),
    ],
)
def test_what_cannot_be_in_a_process_of_its_own_is_refused(
    given: dict[str, Any], roles: dict[str, Any], problem: str
) -> None:
    actor = given.pop("actor", tiny_policy)()
    arguments = {"reward": lambda p, r: [0.0] * len(r), "tokenizer": build_tokenizer(), "roles": RolesConfig(**roles)}
    with pytest.raises(ConfigError, match=problem):
        PPOModule(actor, **(arguments | given))  # type: ignore[arg-type]
