from __future__ import annotations

import math

import pytest
import torch

from lightning_hybrid.rl import KL_ESTIMATORS, estimate_kl

INF = float("inf")


def test_the_three_estimators_match_hand_worked_values() -> None:
    logprobs = torch.tensor([[-1.0, -3.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -1.0]], dtype=torch.float64)
    # d = 0.5 and -2. k2: 0.125 and 2. k3: e^-0.5 - 1 + 0.5 and e^2 - 1 - 2
    assert estimate_kl(logprobs, reference).tolist() == [[0.5, -2.0]]
    assert estimate_kl(logprobs, reference, "k2").tolist() == [[0.125, 2.0]]
    expected = torch.tensor([[math.exp(-0.5) - 0.5, math.exp(2) - 3]], dtype=torch.float64)
    torch.testing.assert_close(estimate_kl(logprobs, reference, "k3"), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("logprob", "reference", "d"), [(-1.0, -INF, 20.0), (-INF, -1.0, -20.0), (-1.0, -90.0, 20.0)])
def test_log_ratios_are_clamped_to_twenty(logprob: float, reference: float, d: float) -> None:
    x = torch.tensor([[logprob]], dtype=torch.float64, requires_grad=True)
    for estimator, expected in (("k1", d), ("k2", d**2 / 2), ("k3", math.exp(-d) - 1 + d)):
        estimate = estimate_kl(x, torch.tensor([[reference]], dtype=torch.float64), estimator)
        assert estimate.item() == pytest.approx(expected, rel=1e-14)
        (gradient,) = torch.autograd.grad(estimate.sum(), x)
        assert gradient.item() == 0.0


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        estimate = estimate_kl(policy.log(), reference.log(), estimator)
        torch.testing.assert_close((policy * estimate).sum(), exact, rtol=1e-12, atol=0)
    assert estimate_kl(policy.log(), reference.log(), "k3").min() > 0


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_estimates_are_differentiable(estimator: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: estimate_kl(a, b, estimator), (x, y))


def test_half_precision_stays_finite() -> None:
    estimate = estimate_kl(torch.tensor([[-100.0]]).half(), torch.tensor([[-1.0]]).half(), "k3")
    assert estimate.dtype == torch.float32
    assert estimate.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="estimator is 'k4', allowed are k1, k2, k3"):
        estimate_kl(torch.zeros(1, 1), torch.zeros(1, 1), "k4")
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \[1, 2\], allowed is \[1, 1\]"):
        estimate_kl(torch.zeros(1, 1), torch.zeros(1, 2))
