"""Generation, scoring and training own the device in turn, and what is trained is the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_hybrid import HybridDeepSpeedStrategy, PPOModule
from lightning_hybrid.config import SleepConfig
from lightning_hybrid.engines.belongings import optimizer_states
from lightning_hybrid.errors import MemoryExhaustedError, StrategyError
from lightning_hybrid.models import scalar_from_policy
from lightning_hybrid.modules import ppo as ppo_module
from lightning_hybrid.modules import sampling
from lightning_hybrid.strategy.residency import Residency
from tests.helpers import SHARD_EVERYTHING, Regression, quiet_trainer, random_batches, tiny_policy, weights_of
from tests.modules.test_ppo import module, prompts

EVERYTHING = dict.fromkeys(SleepConfig.model_fields, True)


def learned_reward() -> Any:
    model = scalar_from_policy(tiny_policy(seed=3))
    nn.init.normal_(model.model.score.weight)
    return model


def strategy_of(stage: int, **arguments: Any) -> HybridDeepSpeedStrategy:
    return HybridDeepSpeedStrategy(stage=stage, config=SHARD_EVERYTHING if stage == 3 else None, **arguments)


def trained(stage: int, sleep: dict[str, bool], ppo: PPOModule, steps: int = 3, **arguments: Any) -> Tensor:
    """Weights of actor and critic after some iterations with a validation after each."""
    settings = {"precision": "32-true", "val_check_interval": 1, "limit_val_batches": 1} | arguments
    quiet_trainer(strategy_of(stage, sleep=sleep), max_steps=steps, **settings).fit(ppo, prompts(), prompts())
    return torch.cat([weights_of(ppo.actor), weights_of(ppo.critic)])


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "bf16-mixed"),
        pytest.param(0, "32-true", marks=pytest.mark.slow),
        pytest.param(3, "32-true", marks=pytest.mark.slow),
    ],
)
def test_ppo_with_a_learned_reward_trains_bit_identically_when_all_that_may_sleep_does(
    stage: int, precision: str
) -> None:
    # Dropping a model's shards between phases must not matter either, hence the validations in between.
    awake, asleep = (
        trained(stage, sleep, module(learned_reward(), old_logprobs="recompute"), precision=precision)
        for sleep in ({}, EVERYTHING)
    )
    assert torch.equal(awake, asleep)


class Residents(L.Callback):
    """What each owner held inside each phase, by wrapping what the phases run, and what callbacks can read."""

    def __init__(self, ppo: PPOModule, patch: pytest.MonkeyPatch) -> None:
        self.inside: dict[str, set[str]] = {}
        self.readable: list[bool] = []
        stages = {
            "rollout": (ppo, "roll_out"),
            "reward": (sampling, "reward_scores"),
            "experience": (ppo_module, "gain_experience"),
        }
        for phase, (place, name) in stages.items():
            patch.setattr(place, name, self._noting(ppo, phase, getattr(place, name)))

    def _noting(self, ppo: PPOModule, phase: str, stage: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            held: dict[str, int] = ppo.trainer.strategy.residency.bytes()
            self.inside.setdefault(phase, {owner for owner, size in held.items() if size})
            return stage(*arguments, **named)

        return run

    def on_train_batch_end(self, trainer: L.Trainer, ppo: Any, *_: Any) -> None:
        held = trainer.strategy.residency.bytes()
        self.inside["update"] = {owner for owner, size in held.items() if size}

    def on_validation_end(self, trainer: L.Trainer, ppo: Any) -> None:
        self.readable.append(bool(weights_of(ppo.actor).isfinite().all() and weights_of(ppo.critic).isfinite().all()))


def test_each_phase_finds_on_the_device_what_it_needs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = module(learned_reward(), old_logprobs="rollout")
    residents = Residents(ppo, monkeypatch)
    trained(2, EVERYTHING, ppo, callbacks=[residents])
    assert residents.inside == {
        "rollout": {"actor/weights"},
        "reward": {"reward_model/weights"},
        "experience": {"reference/weights", "critic/weights"},
        "update": {
            f"{engine}/{kind}" for engine in ("actor", "critic") for kind in ("weights", "master_weights", "optimizer")
        },
    }
    assert residents.readable
    assert all(residents.readable)


def test_a_reward_that_runs_no_model_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = module(old_logprobs="recompute")
    residents = Residents(ppo, monkeypatch)
    trained(2, EVERYTHING, ppo, callbacks=[residents])
    assert residents.inside["reward"] == {"actor/weights", "actor/kv_cache"}


def test_all_weights_can_be_read_after_training() -> None:
    ppo = module(learned_reward())
    trained(2, EVERYTHING, ppo)
    assert all(weights_of(child).isfinite().all() for child in (ppo.actor, ppo.reference, ppo.reward_model))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_after_a_phase_that_failed_all_can_be_read_that_slept_in_it(stage: int) -> None:
    ppo = module(learned_reward())
    strategy = strategy_of(stage, sleep=EVERYTHING)
    states: list[Tensor] = []

    def fail(name: str) -> None:
        if name == "reward" and ppo.global_step == 1:
            states.extend(optimizer_states(strategy.engines["critic"]))
            raise KeyError(name)

    ppo.phases.listeners.append(fail)
    with pytest.raises(KeyError, match="reward"):
        quiet_trainer(strategy, max_steps=2).fit(ppo, prompts())
    assert states
    assert all(state.isfinite().all() for state in states)
    assert all(weights_of(child).isfinite().all() for child in (ppo.critic, ppo.reference))


def test_a_run_resumed_with_sleep_goes_on_as_without(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    results = []
    for sleep in ({}, EVERYTHING):
        folder = tmp_path / str(bool(sleep))
        keep = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=2)
        trained(2, sleep, module(), steps=2, callbacks=[keep], enable_checkpointing=True)
        again = module()
        trainer = quiet_trainer(strategy_of(2, sleep=sleep), max_steps=4)
        trainer.fit(again, prompts(), ckpt_path=str(folder / "last.ckpt"))
        results.append(weights_of(again.actor))
    assert torch.equal(*results)


def test_a_module_without_phases_is_refused_where_something_is_to_sleep() -> None:
    trainer = quiet_trainer(HybridDeepSpeedStrategy(sleep={"optimizer": True, "gradients": True}), max_steps=1)
    with pytest.raises(
        StrategyError,
        match=r"strategy\.sleep\.optimizer, strategy\.sleep\.gradients cannot be used with Regression, whose training",
    ):
        trainer.fit(Regression(), random_batches())


def test_a_module_without_phases_trains_as_before() -> None:
    trainer = quiet_trainer(HybridDeepSpeedStrategy(sleep=dict.fromkeys(EVERYTHING, False)), max_steps=1)
    trainer.fit(Regression(), random_batches())
    assert trainer.global_step == 1


def test_validation_alone_moves_nothing() -> None:
    ppo = module(learned_reward())
    trainer = quiet_trainer(strategy_of(2, sleep=EVERYTHING), limit_val_batches=1)
    assert trainer.validate(ppo, prompts(), verbose=False)[0]["val/response_length"] > 0


@pytest.mark.usefixtures("alone_in_group")
def test_a_phase_that_runs_an_engine_that_is_not_there_is_refused() -> None:
    residency = Residency({}, {"reference": tiny_policy()}, SleepConfig(frozen_models=True))
    with pytest.raises(StrategyError, match=r"phase 'score' runs \['critic'\]; there are: \['reference'\]"):
        residency.enter("score", runs=["critic"])


@pytest.mark.usefixtures("alone_in_group")
def test_weights_for_which_there_is_no_room_keep_their_values_until_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_hybrid.engines import sleep

    def fail(bed: Any) -> None:
        torch.empty(10**15)

    model = tiny_policy()
    before = weights_of(model)
    residency = Residency({}, {"reference": model}, SleepConfig(frozen_models=True))
    residency.enter("train")
    with monkeypatch.context() as patch:
        patch.setattr(sleep, "_wake", fail)
        with pytest.raises(MemoryExhaustedError, match=r"rank 0 ran out of memory in phase 'score': 3\.6 PiB"):
            residency.enter("score", runs=["reference"])
        with pytest.raises(MemoryExhaustedError, match=r"in waking all that sleeps: 3\.6 PiB were asked for"):
            residency.wake_all()
    residency.wake_all()
    assert torch.equal(weights_of(model), before)


def one_rank_cannot_make_room(rank_that_fails: int) -> None:
    """Entry point of a rank."""
    from lightning_hybrid.engines import sleep

    ppo = module()
    original = sleep._wake

    def wake(bed: Any) -> None:
        if torch.distributed.get_rank() == rank_that_fails:
            torch.empty(10**15)
        original(bed)

    sleep._wake = wake
    try:
        trained(2, {"optimizer": True, "frozen_models": True}, ppo, steps=1, devices=2)
    except MemoryExhaustedError as error:
        print("stopped:", error.on_every_rank, str(error).replace("\n", " "))


@pytest.mark.slow
def test_a_rank_without_room_stops_all_ranks_and_is_named(run_ranks: Any) -> None:
    for output in run_ranks(one_rank_cannot_make_room, 2, 1):
        assert "stopped: True making room for phase 'score' failed on 1 of 2 ranks:   rank 1:" in output
        assert "rank 1 ran out of memory" in output
