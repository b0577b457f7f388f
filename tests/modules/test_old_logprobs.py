"""The gap between rollout and training log-probs: measured, logged, and what old log-probs are chosen by."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_hybrid import PPOModule
from lightning_hybrid.config import PPOConfig, RolloutConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.modules.old_logprobs import LogprobGap, OldLogprobSource
from lightning_hybrid.rollout import Rollout, RolloutBackend
from tests.helpers import quiet_trainer, weights_of
from tests.modules.test_ppo import fit, module, prompts

MEAN, LARGEST, OUTSIDE = "rollout/logprob_gap_mean", "rollout/logprob_gap_max", "rollout/ratio_outside"
RECOMPUTED = "rollout/old_logprobs_recomputed"


class ShiftedLogprobs(RolloutBackend):
    """A backend whose log-probs of each response's first token are off by what ``shifts`` holds for the iteration."""

    def __init__(self, backend: RolloutBackend, shifts: Sequence[float]) -> None:
        self.backend = backend
        self.shifts = list(shifts)
        self.rollouts: list[Rollout] = []

    def generate(self, *arguments: Any, **named: Any) -> Rollout:
        drawn = self.backend.generate(*arguments, **named)
        shift = self.shifts[min(len(self.rollouts), len(self.shifts) - 1)]
        first = drawn.response_mask & (drawn.response_mask.cumsum(1) == 1)
        self.rollouts.append(drawn)
        return replace(
            drawn,
            policy_logprobs=drawn.policy_logprobs + shift * first,
            sampling_logprobs=drawn.sampling_logprobs + shift * first,
        )

    def first_share(self, iteration: int) -> float:
        """First tokens among all tokens of a rollout."""
        lengths = self.rollouts[iteration].lengths
        return len(lengths) / int(lengths.sum())


def shifted(*shifts: float, **config: Any) -> PPOModule:
    ppo = module(**config)
    ppo.backend = ShiftedLogprobs(ppo.backend, shifts)
    return ppo


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines said so far about old log-probs."""
    caplog.set_level("WARNING", logger="lightning_hybrid")
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("old_logprobs=")]


@pytest.mark.parametrize("mode", ["recompute", "rollout"])
def test_the_gap_is_the_difference_between_rollout_and_training(mode: str) -> None:
    ppo = shifted(0.2, old_logprobs=mode, micro_batch_size=4)
    rows = fit(ppo, steps=2)
    for iteration, row in enumerate(rows):
        share = ppo.backend.first_share(iteration)  # type: ignore[attr-defined]
        assert row[MEAN] == pytest.approx(0.2 * share, rel=1e-4)
        assert row[LARGEST] == pytest.approx(0.2, rel=1e-4)
        assert row[OUTSIDE] == pytest.approx(share)  # exp(-0.2) = 0.82
        assert row[RECOMPUTED] == float(mode == "recompute")


def test_a_small_gap_leaves_no_ratio_outside() -> None:
    row = fit(shifted(0.05), steps=1)[0]
    assert row[LARGEST] == pytest.approx(0.05, rel=1e-3)
    assert row[OUTSIDE] == 0.0


def test_from_the_rollout_the_gap_is_measured_before_the_first_step() -> None:
    """With many large steps after it, of which none shows in the gap."""
    ppo = module(old_logprobs="rollout", actor_lr=0.05, epochs=2, minibatch_size=4)
    row = fit(ppo, steps=1)[0]
    assert row["policy/approx_kl"] > 1e-3
    assert row[LARGEST] < 1e-5


def test_auto_recomputes_once_and_then_trusts_the_rollout(notices: Callable[[], list[str]]) -> None:
    rows = fit(module(), steps=4)
    assert [row[RECOMPUTED] for row in rows] == [1.0, 0.0, 0.0, 0.0]
    assert all(row[MEAN] < 1e-5 for row in rows)
    (said,) = notices()
    assert said.startswith("old_logprobs=auto: from the rollout, within old_logprob_tolerance=0.001, saving a forward")
    assert "mean |Δ| " in said


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_update_from_the_rollout_equals_a_recomputed_one(temperature: float) -> None:
    settings = {"rollout": {"temperature": temperature}, "kl_coef": 0.1, "minibatch_size": 8, "epochs": 2}
    trusting, recomputing = module(**settings), module(**settings, old_logprobs="recompute")
    rows, expected = fit(trusting, steps=4), fit(recomputing, steps=4)
    assert [row[RECOMPUTED] for row in rows + expected] == [1.0, 0.0, 0.0, 0.0] + [1.0] * 4
    torch.testing.assert_close(weights_of(trusting.actor), weights_of(recomputing.actor), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights_of(trusting.critic), weights_of(recomputing.critic), rtol=1e-4, atol=1e-5)
    for name in ("policy/loss", "policy/kl", "policy/entropy", "value/loss"):
        assert rows[-1][name] == pytest.approx(expected[-1][name], rel=1e-3, abs=1e-5), name


def test_trusting_the_rollout_saves_the_forward_pass() -> None:
    def passes(mode: str) -> int:
        ppo = module(old_logprobs=mode, micro_batch_size=4)
        calls: list[None] = []
        ppo.actor.register_forward_pre_hook(lambda *_: calls.append(None))
        fit(ppo, steps=3)
        return len(calls)

    a_pass = 16 // 4
    assert passes("recompute") == 3 * 2 * a_pass  # old log-probs and the update
    assert passes("rollout") == 3 * a_pass
    assert passes("auto") == (2 + 1 + 1) * a_pass


def test_auto_goes_back_to_recomputing_while_the_gap_is_large_and_says_so(notices: Callable[[], list[str]]) -> None:
    ppo = shifted(0.0, 0.0, 0.5, 0.5, 0.0, 0.0)
    rows = fit(ppo, steps=6)
    # The third rollout is off; it was trusted before that could be seen.
    assert [row[RECOMPUTED] for row in rows] == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert [row[LARGEST] > 0.4 for row in rows] == [False, False, True, True, False, False]
    trusts, distrusts, again = notices()
    assert trusts.startswith("old_logprobs=auto: from the rollout")
    assert distrusts.startswith("old_logprobs=auto: recomputed, not within old_logprob_tolerance=0.001")
    assert "max 0.5" in distrusts
    assert "importance_cap" in distrusts
    assert again.startswith("old_logprobs=auto: from the rollout")


def test_a_lasting_gap_is_said_once(notices: Callable[[], list[str]]) -> None:
    rows = fit(shifted(0.5), steps=3)
    assert [row[RECOMPUTED] for row in rows] == [1.0] * 3
    (said,) = notices()
    assert said.startswith("old_logprobs=auto: recomputed, not within")


def test_the_tolerance_decides() -> None:
    assert fit(shifted(0.05, old_logprob_tolerance=0.1), steps=2)[-1][RECOMPUTED] == 0.0
    assert fit(module(old_logprob_tolerance=1e-12), steps=2)[-1][RECOMPUTED] == 1.0


@pytest.mark.parametrize("mode", ["rollout", "recompute"])
def test_a_choice_that_was_given_is_kept_in_silence(mode: str, notices: Callable[[], list[str]]) -> None:
    rows = fit(shifted(0.5, old_logprobs=mode), steps=2)
    assert [row[RECOMPUTED] for row in rows] == [float(mode == "recompute")] * 2
    assert notices() == []


def one_rank_is_off() -> None:
    """Entry point of a rank: from the second iteration on, rank 1's rollouts are."""
    own: Sequence[float] = (0.0, 0.5) if os.environ.get("LOCAL_RANK") == "1" else (0.0,)
    rows = fit(shifted(*own, minibatch_size=8), steps=3, devices=2)
    print("decided:", [(row[RECOMPUTED], row[MEAN], row[LARGEST], row[OUTSIDE]) for row in rows])


def test_ranks_see_the_same_gap_and_choose_alike(run_ranks: Any) -> None:
    first, second = (
        ast.literal_eval(output.split("decided:")[1].splitlines()[0].strip())
        for output in run_ranks(one_rank_is_off, 2, timeout=90)
    )
    assert first == second
    assert [recomputed for recomputed, *_ in first] == [1.0, 0.0, 1.0]
    assert [largest for _, _, largest, _ in first] == pytest.approx([0.0, 0.5, 0.5], abs=1e-4)


CUT_OFFS = [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"min_new_tokens": 1}]


@pytest.mark.parametrize("shape", CUT_OFFS, ids=lambda shape: next(iter(shape)))
def test_a_rollout_that_does_not_know_old_log_probs_is_refused_up_front(shape: dict[str, Any]) -> None:
    ((name, value),) = shape.items()
    line = rf"old_logprobs='rollout' is not possible: with rollout.temperature=0.7 and {name}={value} the rollout does"
    with pytest.raises(ConfigError, match=line + r".*use recompute or auto"):
        module(rollout={"temperature": 0.7} | shape, old_logprobs="rollout")
    for fine in ({"temperature": 1.0} | shape, {"temperature": 0.7}):
        OldLogprobSource(PPOConfig(old_logprobs="rollout"), RolloutConfig(**fine))


def test_auto_recomputes_what_the_rollout_does_not_know_and_says_why(notices: Callable[[], list[str]]) -> None:
    rows = fit(module(rollout={"temperature": 0.7, "top_k": 5}), steps=2)
    assert [row[RECOMPUTED] for row in rows] == [1.0, 1.0]
    assert math.isfinite(rows[-1][MEAN])
    (said,) = notices()
    assert said.startswith("old_logprobs=auto: recomputed in every iteration, because with rollout.temperature=0.7 and")


def test_at_temperature_one_a_cut_off_is_no_obstacle() -> None:
    rows = fit(module(rollout={"top_k": 5}), steps=2)
    assert rows[-1][RECOMPUTED] == 0.0
    assert rows[-1][LARGEST] < 1e-5


def gap_of(mean: float) -> LogprobGap:
    return LogprobGap(mean, 0.0, 0.0)


def test_a_gap_that_is_not_a_number_is_not_within_tolerance() -> None:
    source = OldLogprobSource(PPOConfig(), RolloutConfig())
    source.judge(gap_of(0.0))
    assert not source.recompute
    source.judge(gap_of(float("nan")))
    assert source.recompute


def test_a_choice_goes_on_from_its_state_where_it_is_still_open() -> None:
    source = OldLogprobSource(PPOConfig(), RolloutConfig())
    source.judge(gap_of(0.0))
    for config, rollout, recompute in (
        (PPOConfig(), RolloutConfig(), False),
        (PPOConfig(old_logprobs="recompute"), RolloutConfig(), True),
        (PPOConfig(importance_cap=2.0), RolloutConfig(), True),
        (PPOConfig(), RolloutConfig(temperature=0.7, top_k=5), True),
    ):
        again = OldLogprobSource(config, rollout)
        again.load_state_dict(source.state_dict())
        assert again.recompute is recompute


def test_a_resumed_run_keeps_its_choice(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    quiet_trainer("hybrid_deepspeed", max_steps=2, callbacks=[keep], enable_checkpointing=True).fit(module(), prompts())
    again = module()
    trainer = quiet_trainer("hybrid_deepspeed", max_steps=3)
    trainer.fit(again, prompts(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert float(trainer.callback_metrics[RECOMPUTED]) == 0.0


# truncated importance sampling


def test_importance_weights_are_measured_and_capped(notices: Callable[[], list[str]]) -> None:
    # the first tokens were sampled with less probability than training gives them: ratio e^0.5 = 1.65
    ppo = shifted(-0.5, importance_cap=1.5)
    rows = fit(ppo, steps=2)
    for iteration, row in enumerate(rows):
        share = ppo.backend.first_share(iteration)  # type: ignore[attr-defined]
        assert row["rollout/importance_weight_mean"] == pytest.approx(1 + 0.5 * share, rel=1e-4)
        assert row["rollout/importance_capped"] == pytest.approx(share)
        assert row[RECOMPUTED] == 1.0
    (said,) = notices()
    assert said == (
        "old_logprobs=auto: recomputed in every iteration, because importance_cap=1.5 compares them with the rollout's"
    )


def test_importance_weights_are_against_the_distribution_drawn_from() -> None:
    """Under top-k a token was drawn with more than the policy's probability, though rollout and training agree."""
    ppo = shifted(0.0, rollout={"top_k": 5}, importance_cap=2.0)
    row = fit(ppo, steps=1)[0]
    (drawn,) = ppo.backend.rollouts  # type: ignore[attr-defined]
    ratios = (drawn.policy_logprobs - drawn.sampling_logprobs).exp()[drawn.response_mask]
    assert row["rollout/importance_weight_mean"] == pytest.approx(float(ratios.mean()), rel=1e-4)
    assert row["rollout/importance_weight_mean"] < 0.9
    assert row[LARGEST] < 1e-5


def test_without_a_cap_there_are_no_importance_figures() -> None:
    assert not any("importance" in name for name in fit(module(), steps=1)[0])


def test_importance_weights_enter_the_update() -> None:
    """Responses of one token, all worth 1, drawn twice as often as the training forward would draw them."""
    settings = {"rollout": {"max_new_tokens": 1}, "whiten_advantages": False, "reward": lambda p, r: [1.0] * len(r)}
    plain, weighted = (
        fit(shifted(math.log(2.0), **settings, **mode), steps=1)[0]["policy/loss"]
        for mode in ({"old_logprobs": "recompute"}, {"importance_cap": 2.0})
    )
    assert plain == pytest.approx(-1.0, rel=1e-5)
    assert weighted == pytest.approx(-0.5, rel=1e-5)


def test_weights_of_equal_log_probs_change_nothing() -> None:
    plain, weighted = module(old_logprobs="recompute"), module(importance_cap=2.0)
    fit(plain, steps=2)
    fit(weighted, steps=2)
    torch.testing.assert_close(weights_of(weighted.actor), weights_of(plain.actor), rtol=1e-4, atol=1e-5)
