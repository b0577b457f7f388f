"""PPO goes on past minibatches with NaN as if they had not been, and stops where there are no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_hybrid import HybridDeepSpeedStrategy
from lightning_hybrid.errors import NonFiniteError
from lightning_hybrid.modules.update import PPOUpdate
from tests.helpers import weights_of
from tests.modules.test_ppo import fit, module

Poison = Callable[[str, Callable[[int], bool]], None]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Make the returns or advantages of those minibatches NaN whose running number is named."""
    count = -1

    def install(what: str, which: Callable[[int], bool]) -> None:
        step = PPOUpdate._step

        def poisoned(self: PPOUpdate, experience: Any, rows: torch.Tensor) -> bool:
            nonlocal count
            count += 1
            if which(count):
                experience = experience.rows(torch.arange(len(experience)))
                getattr(experience, what)[rows] = math.nan
            return step(self, experience, rows)

        monkeypatch.setattr(PPOUpdate, "_step", poisoned)

    return install


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("what", ["returns", "advantages"])
def test_an_iteration_goes_on_past_a_poisoned_minibatch(what: str, stage: int, poison: Poison) -> None:
    poison(what, lambda number: number == 1)
    ppo = module(minibatch_size=8, epochs=2)
    rows = fit(ppo, steps=2, strategy=HybridDeepSpeedStrategy(stage=stage))
    assert [row["nonfinite_steps"] for row in rows] == [1, 1]
    # The engine that saw nothing of it stepped: critic and actor are two models.
    assert rows[-1]["optimizer_steps"] == 8 - (what == "advantages")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert weights_of(ppo.actor).isfinite().all()
    assert weights_of(ppo.critic).isfinite().all()


def test_a_run_that_skips_every_step_stops_after_a_whole_iteration(poison: Poison) -> None:
    poison("returns", lambda number: number >= 4)
    ppo = module(minibatch_size=8)  # two minibatches to an iteration
    with pytest.raises(NonFiniteError, match=r"engine 'critic' skipped its last 4 .*=3\), up to step 3: the loss was"):
        fit(ppo, steps=10, strategy=HybridDeepSpeedStrategy(max_nonfinite_steps=3))
    assert ppo.trainer.global_step == 4  # whole iterations, and the actor took all of its steps
    assert ppo.optimizer_steps == 8
    assert weights_of(ppo.critic).isfinite().all()


def test_an_iteration_without_one_good_minibatch_has_no_figures_of_its_update(poison: Poison) -> None:
    poison("returns", lambda number: number == 0)
    row = fit(module(), steps=1)[0]
    assert math.isnan(row["value/loss"])
    assert math.isfinite(row["rollout/logprob_gap_mean"])
