"""Preference losses: hand-worked values, gradients, and what may not come in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hybrid.rl import (
    PREFERENCE_KINDS,
    kto_baseline,
    kto_loss,
    preference_optimization_loss,
    sequence_logprobs,
)

NAN = float("nan")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# h = (-10 + 12) - (-14 + 13) = 3 in the first pair, and (-7 + 6) - (-5 + 6) = -2 in the second.
PAIRS = (f64(-10.0, -7.0), f64(-14.0, -5.0), f64(-12.0, -6.0), f64(-13.0, -6.0))


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing", "expected"),
    [
        ("sigmoid", 0.1, 0.0, (0.5543552444685271, 0.7981388693815918)),  # ln(1 + e^-0.3), ln(1 + e^0.2)
        ("sigmoid", 0.5, 0.0, (0.2014132779827524, 1.3132616875182228)),  # ln(1 + e^-1.5), ln(1 + e)
        ("sigmoid", 0.1, 0.1, (0.5843552444685271, 0.7781388693815918)),  # each plus 0.1 · 0.1 h
        ("hinge", 0.1, 0.0, (0.7, 1.2)),  # 1 - 0.3, 1 + 0.2
        ("hinge", 0.5, 0.0, (0.0, 2.0)),  # 1 - 1.5 is below 0
        ("ipo", 0.1, 0.0, (4.0, 49.0)),  # (3 - 5)², (-2 - 5)²
        ("ipo", 0.25, 0.0, (1.0, 16.0)),  # (3 - 2)², (-2 - 2)²
    ],
)
def test_each_kind_gives_the_values_worked_by_hand(
    kind: str, beta: float, smoothing: float, expected: tuple[float, float]
) -> None:
    losses, chosen, rejected = preference_optimization_loss(*PAIRS, beta, kind, smoothing)
    torch.testing.assert_close(losses, f64(*expected), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(chosen, beta * f64(2.0, -1.0), rtol=1e-15, atol=0)
    torch.testing.assert_close(rejected, beta * f64(-1.0, 1.0), rtol=1e-15, atol=0)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_a_policy_that_is_its_reference_starts_at_the_known_loss(beta: float) -> None:
    chosen, rejected = f64(-31.0, -4.0), f64(-2.0, -90.0)
    same = (chosen, rejected, chosen, rejected, beta)
    starts = {kind: preference_optimization_loss(*same, kind)[0] for kind in PREFERENCE_KINDS}
    torch.testing.assert_close(starts["sigmoid"], f64(math.log(2), math.log(2)), rtol=1e-15, atol=0)
    torch.testing.assert_close(starts["hinge"], f64(1.0, 1.0), rtol=0, atol=0)
    torch.testing.assert_close(starts["ipo"], f64(1.0, 1.0) / (4 * beta**2), rtol=1e-15, atol=0)
    torch.testing.assert_close(
        preference_optimization_loss(*same, label_smoothing=0.3)[0], starts["sigmoid"], rtol=1e-15, atol=0
    )


def test_the_gradient_of_dpo_is_the_papers() -> None:
    """Rafailov et al. 2023, section 4: beta · sigmoid(rejected reward - chosen reward), and its negative."""
    chosen, rejected = (x.clone().requires_grad_() for x in PAIRS[:2])
    losses, chosen_rewards, rejected_rewards = preference_optimization_loss(chosen, rejected, *PAIRS[2:], 0.1)
    losses.sum().backward()
    expected = 0.1 * torch.sigmoid(rejected_rewards - chosen_rewards)
    torch.testing.assert_close(chosen.grad, -expected)
    torch.testing.assert_close(rejected.grad, expected)
    assert not chosen_rewards.requires_grad
    assert not rejected_rewards.requires_grad


@pytest.mark.parametrize(
    "setting", [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)], ids=lambda s: f"{s[0]}-{s[1]}"
)
def test_gradients_agree_with_finite_differences(setting: tuple[str, float]) -> None:
    inputs = tuple(x.clone().requires_grad_() for x in PAIRS)
    assert torch.autograd.gradcheck(lambda *x: preference_optimization_loss(*x, 0.3, *setting)[0], inputs)


def test_zeros_for_the_reference_are_the_reference_free_form() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    losses, chosen, _ = preference_optimization_loss(*PAIRS[:2], zeros, zeros, 0.1)
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(0.1 * (PAIRS[0] - PAIRS[1])))
    torch.testing.assert_close(chosen, 0.1 * PAIRS[0])


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
@pytest.mark.parametrize("lead", [1e4, -1e4])
def test_losses_and_gradients_stay_finite_however_far_apart_the_log_probs_are(kind: str, lead: float) -> None:
    chosen = torch.tensor([lead], requires_grad=True)
    zero = torch.zeros(1)
    losses, _, _ = preference_optimization_loss(chosen, zero, zero, zero, 1.0, kind)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_half_precision_is_widened() -> None:
    half = [x.bfloat16() for x in PAIRS]
    losses, chosen, rejected = preference_optimization_loss(*half, 0.1)
    assert losses.dtype == chosen.dtype == rejected.dtype == torch.float32
    torch.testing.assert_close(losses.double(), preference_optimization_loss(*PAIRS, 0.1)[0])  # whole numbers are exact


# ---- log-probs of responses -----------------------------------------------------------------------------------------


def test_a_response_counts_its_own_tokens_and_nan_behind_the_mask_stays_there() -> None:
    logprobs = torch.tensor([[NAN, -1.0, -2.0, NAN], [NAN, NAN, NAN, NAN]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    totals = sequence_logprobs(logprobs, mask)
    torch.testing.assert_close(totals, f64(-3.0, 0.0))
    zero = torch.zeros(2, dtype=torch.float64)
    preference_optimization_loss(totals, zero, zero, zero, 0.1)[0].sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert (logprobs.grad[~mask] == 0).all()
    assert (logprobs.grad[0, 1:3] != 0).all()


# ---- KTO ------------------------------------------------------------------------------------------------------------

DESIRABLE = torch.tensor([True, False])


def test_kto_gives_the_values_worked_by_hand() -> None:
    # r = 2 and -1; z0 = 0.5; beta = 0.1: 1 - sigmoid(0.15), 1 - sigmoid(0.15)
    losses, rewards = kto_loss(f64(-10.0, -7.0), f64(-12.0, -6.0), DESIRABLE, 0.5, 0.1)
    torch.testing.assert_close(losses, f64(0.46257015465625045, 0.46257015465625045), rtol=1e-14, atol=0)
    torch.testing.assert_close(rewards, f64(0.2, -0.1))
    losses, _ = kto_loss(f64(-10.0, -7.0), f64(-12.0, -6.0), ~DESIRABLE, f64(0.5)[0], 0.1, 3.0, 2.0)
    torch.testing.assert_close(losses, 0.5374298453437496 * f64(2.0, 3.0), rtol=1e-14, atol=0)


def test_kto_is_lambda_less_the_value_of_equation_8() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, ref = torch.randn(2, 16, dtype=torch.float64, generator=generator) * 9
    desirable = torch.rand(16, generator=generator) < 0.5
    losses, _ = kto_loss(policy, ref, desirable, 1.5, 0.2, 1.25, 0.75)
    ratio = policy - ref
    value = torch.where(desirable, 1.25 * torch.sigmoid(0.2 * (ratio - 1.5)), 0.75 * torch.sigmoid(0.2 * (1.5 - ratio)))
    torch.testing.assert_close(losses, torch.where(desirable, 1.25, 0.75).double() - value)


def test_kto_pulls_desirable_responses_up_and_undesirable_ones_down() -> None:
    policy = f64(-5.0, -5.0).requires_grad_()
    losses, _ = kto_loss(policy, f64(-5.0, -5.0), DESIRABLE, 0.0, 0.1)
    torch.testing.assert_close(losses.detach(), f64(0.5, 0.5))
    losses.sum().backward()
    torch.testing.assert_close(policy.grad, f64(-0.025, 0.025))  # beta · sigmoid · (1 - sigmoid)


def test_kto_gradients_agree_with_finite_differences_and_the_baseline_gets_none() -> None:
    inputs = (f64(-3.0, -8.0).requires_grad_(), f64(-4.0, -6.0).requires_grad_())
    assert torch.autograd.gradcheck(lambda p, r: kto_loss(p, r, DESIRABLE, 0.3, 0.4, 1.5, 0.5)[0], inputs)
    baseline = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kto_loss(*inputs, DESIRABLE, baseline, 0.4)[0].sum().backward()
    assert baseline.grad is None


def test_the_baseline_is_the_mean_over_all_ranks_and_never_below_zero() -> None:
    policy = f64(-3.0, -8.0).requires_grad_()
    assert kto_baseline(policy, f64(-6.0, -7.0)).item() == 1.0  # (3 - 1) / 2
    assert kto_baseline(policy, f64(-3.0, -2.0)).item() == 0.0  # (0 - 6) / 2 is below
    seen = []

    def other_rank_adds(sums: Tensor) -> Tensor:
        seen.append(sums.tolist())
        return sums + f64(10.0, 1.0)

    baseline = kto_baseline(policy, f64(-6.0, -7.0), other_rank_adds)
    assert baseline.item() == 4.0  # (2 + 10) / 3
    assert seen == [[2.0, 2.0]]
    assert not baseline.requires_grad
    assert kto_baseline(f64(), f64()).item() == 0.0


# ---- what may not come in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0, allowed are finite numbers above 0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": NAN}, "beta is nan"),
        ({"kind": "dpo"}, "kind is 'dpo', allowed are sigmoid, hinge, ipo"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5, allowed are numbers from 0 to below 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "label_smoothing is 0.1 with kind 'ipo', allowed is 0"),
        ({"ref_chosen": f64(1.0)}, r"ref_chosen has shape \[1\], allowed is that of policy_chosen, \[2\]"),
        ({"policy_chosen": torch.zeros(2, 3)}, r"policy_chosen has shape \[2, 3\], allowed is \[batch\]"),
    ],
)
def test_wrong_input_is_refused(changes: dict[str, Any], message: str) -> None:
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    arguments: dict[str, Any] = dict(zip(names, PAIRS, strict=True)) | {"beta": 0.1} | changes
    with pytest.raises(ValueError, match=message):
        preference_optimization_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"desirable": torch.tensor([1, 0])}, "desirable has dtype torch.int64, allowed is torch.bool"),
        ({"desirable": torch.tensor([True])}, r"desirable has shape \[1\], allowed is that of policy, \[2\]"),
        ({"beta": 0}, "beta is 0"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0, allowed are finite numbers from 0 up"),
        ({"undesirable_weight": NAN}, "undesirable_weight is nan"),
    ],
)
def test_wrong_input_of_kto_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "policy": f64(-1.0, -2.0),
        "ref": f64(-1.0, -2.0),
        "desirable": DESIRABLE,
        "baseline": 0.0,
        "beta": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        kto_loss(**(arguments | changes))
