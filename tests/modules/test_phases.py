"""Phases announce themselves first, measure time and memory, and say who holds the memory where it runs out."""

from __future__ import annotations

import resource
import time
from typing import Any

import lightning as L
import pytest
import torch

from lightning_hybrid import HybridDeepSpeedStrategy, RolloutConfig
from lightning_hybrid.errors import LightningHybridError, MemoryExhaustedError
from lightning_hybrid.modules import experience
from lightning_hybrid.modules import ppo as ppo_module
from lightning_hybrid.modules.phases import Phases
from tests.helpers import PPO_FIGURES, quiet_trainer, weights_of
from tests.modules.test_ppo import fit, module, prompts

PHASES = ("rollout", "reward", "experience", "update")
BILLIONS = 10**15


class StopThereError(Exception):
    pass


def test_a_phase_is_announced_before_anything_of_it_happens() -> None:
    phases, seen = Phases(), []
    phases.listeners.append(lambda name: seen.append(f"{name} announced"))
    with phases("rollout"):
        seen.append("ran")
    assert seen == ["rollout announced", "ran"]
    assert phases.seconds["rollout"] > 0


def test_a_phase_that_runs_twice_in_an_iteration_is_timed_as_one() -> None:
    phases = Phases()
    phases.begin()
    for _ in range(2):
        with phases("rollout"):
            time.sleep(0.02)
    assert phases.seconds["rollout"] >= 0.04
    phases.begin()
    assert phases.seconds == {}


def test_a_listener_that_raises_stops_before_the_phase_and_before_anything_moves() -> None:
    ppo = module(kl_coef=0.01, kl_target=1e-3, normalize_reward=True, reward_clip=None)
    strategy = HybridDeepSpeedStrategy(sleep={"optimizer": True, "frozen_models": True})
    held: list[Any] = []

    def stop(name: str) -> None:
        if name == "update" and ppo.global_step == 1:
            held.append((strategy.residency.bytes(), weights_of(ppo.actor), state_of(ppo)))
            raise StopThereError

    class Stop(L.Callback):
        def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
            held.append((strategy.residency.bytes(), weights_of(ppo.actor), state_of(ppo)))

        def on_train_batch_end(self, *_: Any) -> None:
            held.append((None, weights_of(ppo.actor), state_of(ppo)))

    ppo.phases.listeners.append(stop)
    with pytest.raises(StopThereError):
        quiet_trainer(strategy, max_steps=3, callbacks=[Stop()]).fit(ppo, prompts())
    first_iteration, when_told, after = held
    assert when_told[0] == after[0]
    assert when_told[0]["actor/optimizer"] == 0
    for later in (when_told, after):
        assert torch.equal(later[1], first_iteration[1])
        assert later[2] == first_iteration[2]


def state_of(ppo: Any) -> dict[str, Any]:
    """What a checkpoint written now would hold of the module's own."""
    checkpoint: dict[str, Any] = {}
    ppo.on_save_checkpoint(checkpoint)
    return checkpoint["ppo"]


def test_the_moments_of_the_scores_change_at_the_end_of_an_iteration_only() -> None:
    ppo = module(reward=lambda p, r: [100.0 * len(text) for text in r], normalize_reward=True, reward_clip=None)
    counts = []
    ppo.phases.listeners.append(lambda name: counts.append((name, state_of(ppo)["scores"]["count"])))
    fit(ppo, steps=2)
    assert counts == [(name, 16.0 * iteration) for iteration in (0, 1) for name in PHASES]
    assert state_of(ppo)["scores"]["count"] == 32


def test_peaks_and_owners_of_each_phase_are_logged() -> None:
    row = fit(module(), steps=2)[-1]
    assert set(row) >= PPO_FIGURES
    peaks = {f"memory/{phase}_peak_mib" for phase in PHASES}
    owners = ("actor/weights", "actor/optimizer", "actor/kv_cache", "critic/weights", "reference/weights")
    held = {f"memory/{phase}/{owner}_mib" for phase in PHASES for owner in owners}
    assert peaks | held <= set(row)
    assert all(row[name] > 0 for name in peaks)
    assert "memory/update/actor/gradients_mib" not in row  # of which there are none between steps
    assert row["memory/update/actor/master_weights_mib"] == pytest.approx(row["memory/update/actor/weights_mib"])


def test_what_sleeps_is_logged_as_nothing_in_the_phases_where_it_does() -> None:
    row = fit(module(), steps=2, strategy=HybridDeepSpeedStrategy(sleep={"optimizer": True}))[-1]
    figures = [row[f"memory/{phase}/actor/optimizer_mib"] for phase in PHASES]
    assert figures[:3] == [0, 0, 0]
    assert figures[3] > 0


def test_validation_announces_nothing_and_leaves_the_figures_of_training() -> None:
    ppo, heard = module(), []
    ppo.phases.listeners.append(heard.append)
    quiet_trainer("hybrid_deepspeed", max_steps=1, limit_val_batches=1).fit(ppo, prompts(), prompts())
    assert heard == list(PHASES)
    assert set(ppo.phases.seconds) == set(PHASES)


def out_of_memory_in_phase(phase: str, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> MemoryExhaustedError:
    """The error of a run in which a phase asks for a tensor that no machine has room for."""
    ppo = module(**arguments)

    def ask(*_: Any, **__: Any) -> Any:
        return torch.empty(BILLIONS)

    if phase == "rollout":
        monkeypatch.setattr(ppo.backend, "generate", ask)
    elif phase == "reward":
        monkeypatch.setattr(ppo.reward, "_function", ask, raising=False)
        monkeypatch.setattr(type(ppo.reward), "__call__", ask)
    elif phase == "experience":
        monkeypatch.setattr(experience, "critic_values", ask)
    else:
        monkeypatch.setattr(ppo_module.PPOUpdate, "_train_actor", ask)
    with pytest.raises(MemoryExhaustedError) as raised:
        fit(ppo, steps=1)
    return raised.value


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("rollout", r"lower rollout.max_tokens_in_flight (now 512), or lower rollout.max_new_tokens (now 8)"),
        ("reward", "lower data.batch_size"),
        ("experience", "lower algorithm.micro_batch_size (now 16), or lower algorithm.logprob_chunk (now 1024)"),
        ("update", "lower algorithm.micro_batch_size (now 16), or lower algorithm.logprob_chunk (now 1024)"),
    ],
)
def test_memory_that_runs_out_names_phase_size_owners_and_remedy(
    phase: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = str(out_of_memory_in_phase(phase, monkeypatch, rollout={"max_tokens_in_flight": 512}))
    assert f"rank 0 ran out of memory in phase '{phase}': 3.6 PiB were asked for" in message
    assert "actor/weights 84.9 KiB" in message.partition("On cpu are ")[2]
    assert remedy in message


def test_memory_of_the_cache_is_offered_to_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "set strategy.sleep.kv_cache=true" in str(out_of_memory_in_phase("update", monkeypatch))


def test_other_errors_stay_what_they_are() -> None:
    ppo = module(reward=lambda p, r: 1 / 0)
    with pytest.raises(LightningHybridError, match="ZeroDivisionError") as raised:
        fit(ppo, steps=1)
    assert not isinstance(raised.value, MemoryExhaustedError)


def exhausted_for_real() -> None:
    """Entry point of a rank whose address space ends a little above what it uses when the update begins."""
    ppo = module(micro_batch_size=256)
    ppo.rollout_config = RolloutConfig(max_new_tokens=8)

    def limit(name: str) -> None:
        if name == "update":
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))

    ppo.phases.listeners.append(limit)
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=1)
    try:
        trainer.fit(ppo, prompts(256, batch_size=256))
    except MemoryExhaustedError as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("stopped:", error)


@pytest.mark.slow
def test_a_process_that_may_have_no_more_memory_says_so(run_ranks: Any) -> None:
    (output,) = run_ranks(exhausted_for_real, 1)
    assert "stopped: rank 0 ran out of memory in phase 'update': " in output
    assert "were asked for. On cpu are " in output
    assert "lower algorithm.micro_batch_size (now 256)" in output
