from __future__ import annotations

import math

import pytest
import torch

from lightning_hybrid.rl import logprob_gap, policy_loss, truncated_importance_weights

NAN, INF = float("nan"), float("inf")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def log64(*values: float) -> torch.Tensor:
    return f64(*(math.log(value) for value in values))


def mask_of(*counts: bool) -> torch.Tensor:
    return torch.tensor([counts])


FOUR_OF_FIVE = mask_of(True, True, True, True, False)


def figures(gap: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in gap.items()}


def test_the_gap_matches_hand_worked_tokens() -> None:
    # ratios training over rollout: 1, 1.05, 0.89, 1.2; a masked infinity does not count
    training = (f64(-1.0, -1.0, -1.0, -1.0, -INF) + log64(1.0, 1.05, 0.89, 1.2, 1.0)).requires_grad_()
    gap = logprob_gap(training, f64(-1.0, -1.0, -1.0, -1.0, NAN), FOUR_OF_FIVE)
    expected = {
        "gap": math.log(1.05) - math.log(0.89) + math.log(1.2),
        "outside": 2.0,
        "tokens": 4.0,
        "gap_max": math.log(1.2),
    }
    assert figures(gap) == pytest.approx(expected, rel=1e-12)
    assert not any(value.requires_grad for value in gap.values())


def test_the_usual_ratios_are_from_nine_to_eleven_tenths() -> None:
    gap = logprob_gap(log64(0.9001, 0.8999, 1.0999, 1.1001), f64(0, 0, 0, 0), mask_of(True, True, True, True))
    assert gap["outside"] == 2


def test_the_gap_of_float32_is_summed_in_float64() -> None:
    training = torch.zeros(100, 1000)
    rollout = torch.full_like(training, 1e-7)
    gap = logprob_gap(training, rollout, torch.ones_like(training).bool())
    assert gap["gap"].item() == pytest.approx(float(rollout[0, 0]) * 1e5, rel=1e-12)


def test_a_gap_that_is_not_a_number_stays_visible() -> None:
    gap = logprob_gap(f64(NAN, 0.0), f64(0.0, 0.0), mask_of(True, True))
    assert math.isnan(gap["gap"])
    assert gap["outside"] == 1


def test_the_gap_of_nothing_is_zero() -> None:
    assert set(figures(logprob_gap(f64(NAN), f64(NAN), mask_of(False))).values()) == {0.0}
    assert set(figures(logprob_gap(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3).bool())).values()) == {0.0}


def test_weights_match_hand_worked_ratios_and_stop_at_the_cap() -> None:
    rollout = f64(-1.0, -2.0, -3.0, -4.0, NAN)
    training = rollout + log64(0.25, 1.0, 1.9, 3.0, 1.0)
    weights = truncated_importance_weights(training.requires_grad_(), rollout, FOUR_OF_FIVE, cap=2.0)
    assert weights[0].tolist() == pytest.approx([0.25, 1.0, 1.9, 2.0, 0.0], rel=1e-12)
    assert not weights.requires_grad


def test_weights_of_infinite_log_probs_are_finite() -> None:
    weights = truncated_importance_weights(f64(-INF, 0.0), f64(-1.0, -INF), mask_of(True, True), cap=3.0)
    assert weights[0].tolist() == pytest.approx([math.exp(-20), 3.0])


def test_weights_scale_the_loss_of_each_token_after_clipping() -> None:
    logprobs = torch.cat((log64(1.5, 0.5, 1.1), f64(NAN)), 1).requires_grad_()
    old, mask = f64(0.0, 0.0, 0.0, 0.0), mask_of(True, True, True, False)
    weights = f64(0.5, 2.0, 1.0, NAN).requires_grad_()
    # clipped to [0.8, 1.2]: -1.2 * 0.5 clipped, -0.5 * 2 inside, 3 * 1.1 inside; mean over 3
    loss, _ = policy_loss(logprobs, old, f64(1.0, 1.0, -3.0, NAN), mask, weights=weights)
    assert loss.item() == pytest.approx((-0.6 - 1.0 + 3.3) / 3, rel=1e-12)
    gradient, of_weights = torch.autograd.grad(loss, [logprobs, weights], allow_unused=True)
    assert gradient[0].tolist() == pytest.approx([0.0, -1.0 / 3, 3.3 / 3, 0.0], rel=1e-12)
    assert of_weights is None


def test_weights_of_one_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 4, 5, generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    plain, metrics = policy_loss(logprobs, old, advantages, mask)
    weighted, same = policy_loss(logprobs, old, advantages, mask, weights=torch.ones(4, 5))
    assert torch.equal(plain, weighted)
    assert metrics == same


def test_bad_arguments_are_refused() -> None:
    x, mask = f64(0.0), mask_of(True)
    with pytest.raises(ValueError, match=r"cap is 0.5, allowed are numbers from 1 up"):
        truncated_importance_weights(x, x, mask, cap=0.5)
    with pytest.raises(ValueError, match=r"rollout has shape \[1\], allowed is the mask's \[1, 1\]"):
        logprob_gap(x, torch.zeros(1), mask)
    with pytest.raises(ValueError, match=r"weights has shape \[1\], allowed is the mask's \[1, 1\]"):
        policy_loss(x, x, x, mask, weights=torch.ones(1))
