"""Algorithms without a critic inside ``Trainer.fit``: they learn, and run what they need and nothing else."""

from __future__ import annotations

import math
import warnings
from typing import Any

import lightning as L
import pytest
import torch

from lightning_hybrid import HybridDeepSpeedStrategy, PPOModule, RolloutConfig
from lightning_hybrid.algorithms import ALGORITHMS, DAPOConfig, GRPOConfig, OnlineConfig, PPOConfig
from lightning_hybrid.config import AdapterConfig, FrozenRoleConfig, RolesConfig, TrainedRoleConfig
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError
from tests.helpers import quiet_trainer, tiny_policy, weights_of
from tests.modules.test_ppo import History, prompts, warm_share

CRITIC_FREE = [name for name, algorithm in ALGORITHMS.items() if not algorithm.critic]
QUICK = ("grpo", "gspo")  # of two kinds of ratio
LEARNING = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CRITIC_FREE]


class BuiltEngines(L.Callback):
    """Remembers which engines a run had, and their ZeRO stages."""

    stages: dict[str, int]

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stages = {name: engine.zero_optimization_stage() for name, engine in trainer.strategy.engines.items()}


def online(config: OnlineConfig, reward: Any = warm_share, **arguments: Any) -> PPOModule:
    return PPOModule(tiny_policy(), reward, config, RolloutConfig(max_new_tokens=8), build_tokenizer(), **arguments)


def of(name: str, **changes: Any) -> OnlineConfig:
    settings: dict[str, Any] = {"actor_lr": 3e-3, "micro_batch_size": 64, "group_size": 4}
    if ALGORITHMS[name]().kl_coef:
        settings["kl_coef"] = 0.001
    if name == "rloo":
        settings["max_grad_norm"] = 0.3
    return ALGORITHMS[name](**(settings | changes))


def fit(
    module: PPOModule, steps: int, strategy: Any = "hybrid_deepspeed", batch_size: int = 8, callbacks: Any = ()
) -> list[dict[str, float]]:
    history = History()
    trainer = quiet_trainer(strategy, max_steps=steps, callbacks=[history, *callbacks])
    trainer.fit(module, prompts(rows=32, batch_size=batch_size))
    return history.rows


@pytest.mark.parametrize("name", LEARNING)
def test_each_algorithm_learns_what_its_reward_prefers(name: str) -> None:
    rows = fit(online(of(name)), steps=40)
    first, last = (sum(row["reward/score"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert first < 0.1
    assert last > 0.4


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_no_algorithm_but_ppo_builds_a_critic_and_each_logs_finite_figures(name: str) -> None:
    module = online(of(name))
    built = BuiltEngines()
    row = fit(module, steps=1, callbacks=[built])[0]
    assert set(built.stages) == {"actor"}
    assert not [figure for figure in row if figure.startswith("value/")]
    assert ("policy/kl" in row) == module.config.reference == ("reference" in dict(module.named_children()))
    assert all(math.isfinite(value) for value in row.values())
    assert row["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)


def test_responses_to_a_prompt_stand_together_and_share_its_columns() -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def reward(prompts: list[str], responses: list[str]) -> list[int]:
        seen.append((prompts, responses))
        return list(range(len(responses)))

    fit(online(of("grpo", group_size=3), reward=reward), steps=1, batch_size=4)
    ((texts, responses),) = seen
    assert len(responses) == 12
    assert [texts[3 * i : 3 * i + 3] for i in range(4)] == [[texts[3 * i]] * 3 for i in range(4)]
    assert len(set(responses[:3])) > 1


def test_a_loss_of_the_kl_holds_the_policy_near_its_reference() -> None:
    free, held = (fit(online(of("grpo", kl_coef=price)), steps=25)[-1] for price in (1e-6, 3.0))
    assert held["policy/kl"] < free["policy/kl"] / 3
    assert held["policy/kl_loss"] > 0


@pytest.mark.filterwarnings("ignore:all 8 groups of iteration")
def test_a_group_whose_scores_are_equal_tells_nothing_and_is_counted() -> None:
    module = online(of("dr_grpo"), reward=lambda p, r: [1.0] * len(r))
    before = weights_of(module.actor)
    row = fit(module, steps=1)[0]
    assert row["rollout/uninformative_groups"] == 1.0
    assert row["policy/loss"] == 0.0
    assert torch.equal(weights_of(module.actor), before)


def test_scores_that_are_equal_in_every_group_are_said_and_counted() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(online(of("grpo"), reward=lambda p, r: [0.0] * len(r)), steps=3)
    said = [str(warning.message) for warning in caught if "equal scores" in str(warning.message)]
    assert [text.partition(",")[0] for text in said] == [
        f"all 8 groups of iteration {iteration} have equal scores inside each group" for iteration in (1, 2)
    ]
    assert "(2 such iterations so far)" in said[1]


class InformativeFrom:
    """Scores that differ inside a group from the prompt of this position in the batch on; equal before it."""

    def __init__(self, position: int, group_size: int) -> None:
        self.position, self.size, self.asked = position, group_size, 0

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        groups = range(self.asked, self.asked + len(responses) // self.size)
        self.asked += len(groups)
        return [float(sample) if group >= self.position else 1.0 for group in groups for sample in range(self.size)]


def test_dynamic_sampling_goes_on_until_enough_groups_tell_something() -> None:
    module = online(of("dapo", groups=3, group_size=2), reward=InformativeFrom(4, 2))
    row = fit(module, steps=1)[0]
    # 3, then the 3 that are missing of which 2 tell something, then the 1 left to find.
    assert row["rollout/samples_drawn"] == 2 * (3 + 3 + 1)
    assert row["rollout/uninformative_groups"] == 0.0
    assert module.last_rollout.tokens.shape[0] == 6


@pytest.mark.filterwarnings("ignore:all 3 groups of iteration")
def test_groups_whose_scores_differ_only_beyond_the_clip_tell_nothing() -> None:
    module = online(of("dapo", groups=3, group_size=2, reward_clip=1.0), reward=lambda p, r: [5.0, 6.0] * (len(r) // 2))
    row = fit(module, steps=1)[0]
    assert row["rollout/samples_drawn"] == 2 * 8
    assert row["rollout/uninformative_groups"] == 1.0


def test_without_groups_equal_scores_are_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*equal scores")
        fit(online(of("reinforce_plus_plus"), reward=lambda p, r: [0.0] * len(r)), steps=1)


def test_where_the_batch_is_at_its_end_the_iteration_fills_up_with_what_there_is() -> None:
    module = online(of("dapo", groups=3, group_size=2), reward=InformativeFrom(7, 2))
    row = fit(module, steps=1)[0]
    assert row["rollout/samples_drawn"] == 2 * 8
    assert row["rollout/uninformative_groups"] == pytest.approx(2 / 3)


def test_without_dynamic_sampling_nothing_is_drawn_twice() -> None:
    row = fit(online(of("dapo", group_size=2), reward=InformativeFrom(7, 2)), steps=1)[0]
    assert row["rollout/samples_drawn"] == 2 * 8


def test_the_overlong_penalty_grows_over_the_buffer() -> None:
    module = online(of("grpo", overlong_buffer=4, overlong_penalty=2.0), reward=lambda p, r: [0.0] * len(r))
    row = fit(module, steps=1)[0]
    lengths = module.last_rollout.lengths.float()
    expected = -2.0 * ((lengths - 4) / 4).clamp(0, 1).mean()
    assert row["reward/entered"] == pytest.approx(float(expected), abs=1e-6)
    assert row["reward/entered"] < 0


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "cispo", "reinforce_plus_plus_baseline"])
def test_micro_batches_do_not_change_the_update(algorithm: str) -> None:
    after = [weights_of(_trained(of(algorithm, micro_batch_size=size, epochs=2))) for size in (64, 3)]
    assert torch.allclose(*after, rtol=1e-5, atol=5e-6)


def _trained(config: OnlineConfig) -> torch.nn.Module:
    module = online(config)
    fit(module, steps=2)
    return module.actor


def test_each_model_may_have_its_own_stage_dropout_and_checkpointing() -> None:
    roles = RolesConfig(
        actor=TrainedRoleConfig(gradient_checkpointing=True), critic=TrainedRoleConfig(zero_stage=3, dropout=0.1)
    )
    module, built = online(PPOConfig(micro_batch_size=16, actor_lr=3e-3, critic_lr=3e-3), roles=roles), BuiltEngines()
    fit(module, steps=2, strategy=HybridDeepSpeedStrategy(stage=1), callbacks=[built])
    assert built.stages == {"actor": 1, "critic": 3}
    assert module.critic is not None
    assert {part.attention_dropout for part in module.critic.modules() if hasattr(part, "attention_dropout")} == {0.1}


def test_a_frozen_model_may_be_copied_to_every_rank_in_low_precision() -> None:
    module = online(of("grpo", kl_coef=0.1), roles=RolesConfig(reference=FrozenRoleConfig(zero_stage=0)))
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=1, precision="bf16-true", callbacks=[history := History()])
    trainer.fit(module, prompts(rows=8, batch_size=8))
    assert history.rows[0]["policy/kl"] == pytest.approx(0.0, abs=0.1)


def test_gradient_checkpointing_computes_the_same_update() -> None:
    plain, twice = (
        online(of("grpo"), roles=RolesConfig(actor=TrainedRoleConfig(gradient_checkpointing=again)))
        for again in (False, True)
    )
    for module in (plain, twice):
        fit(module, steps=2)
    assert torch.allclose(weights_of(plain.actor), weights_of(twice.actor), rtol=1e-6, atol=1e-7)


def test_what_an_algorithm_has_no_use_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="critic was given, but 'grpo' has no critic"):
        online(GRPOConfig(), critic="a-model")
    with pytest.raises(ConfigError, match="critic_adapter was given, but 'grpo' has no critic: leave it out, or use"):
        online(GRPOConfig(), critic_adapter=AdapterConfig())
    with pytest.raises(ConfigError, match=r"roles\.critic was given, but 'grpo' has no critic"):
        online(GRPOConfig(), roles=RolesConfig(critic=TrainedRoleConfig(dropout=0.1)))
    with pytest.raises(ConfigError, match="reward_tokenizer belongs to a reward model .*, and reward is function"):
        online(GRPOConfig(), reward_tokenizer=build_tokenizer())
    with pytest.raises(ConfigError, match="reference was given, but DAPOConfig has reference=False"):
        online(DAPOConfig(), reference="a-model")
    with pytest.raises(ConfigError, match=r"the PTX loss needs ptx, its texts, with ptx_coef=0\.5"):
        online(GRPOConfig(ptx_coef=0.5))
