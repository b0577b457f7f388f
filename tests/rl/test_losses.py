from __future__ import annotations

import math

import pytest
import torch

from lightning_hybrid.rl import AGGREGATIONS, aggregate, policy_loss, preference_loss, value_loss

NAN, INF = float("nan"), float("inf")


def f64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def full_mask(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


# aggregate

LOSSES = f64([1.0, 2.0, 3.0, NAN], [8.0, 99.0, NAN, NAN], [NAN, NAN, NAN, NAN])
LOSS_MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", 3.5),  # (1 + 2 + 3 + 8) / 4 tokens
        ("seq_mean_token_mean", 5.0),  # (6 / 3 + 8 / 1) / 2 sequences: the empty one is not counted
        ("seq_mean_token_sum", 7.0),  # (6 + 8) / 2
        ("seq_mean_token_sum_norm", 1.75),  # (6 / 4 + 8 / 4) / 2, four being the padded length
    ],
)
def test_each_aggregation_matches_a_hand_worked_value(mode: str, expected: float) -> None:
    assert aggregate(LOSSES, LOSS_MASK, mode).item() == expected


def test_norm_divides_the_token_sums() -> None:
    assert aggregate(LOSSES, LOSS_MASK, "seq_mean_token_sum_norm", norm=10.0).item() == pytest.approx(0.7)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_nothing_that_counts_gives_zero_and_a_finite_gradient(mode: str) -> None:
    x = torch.full((2, 3), NAN, dtype=torch.float64, requires_grad=True)
    for denominator in (None, 0, torch.tensor(0)):
        loss = aggregate(x, torch.zeros(2, 3, dtype=torch.bool), mode, denominator=denominator)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0.0
        assert gradient.abs().sum() == 0.0


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_with_the_global_count_micro_batches_add_up_to_the_whole(mode: str, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    old, advantages = torch.randn(2, 8, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(8, 5, generator=generator) < 0.6
    mask[3] = False
    count = mask.sum() if mode == "token_mean" else mask.any(1).sum()

    def gradient(micro: int, denominator: torch.Tensor | None) -> torch.Tensor:
        x = logprobs.clone().requires_grad_()
        for start in range(0, 8, micro):
            part = slice(start, start + micro)
            loss, _ = policy_loss(
                x[part], old[part], advantages[part], mask[part], aggregation=mode, denominator=denominator
            )
            loss.backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient(size, count), gradient(8, None), rtol=1e-12, atol=1e-15)


def test_aggregate_refuses_bad_arguments() -> None:
    x, mask = torch.zeros(1, 2), full_mask(1, 2)
    with pytest.raises(ValueError, match="aggregation mode is 'mean', allowed are token_mean, seq_mean_token_mean"):
        aggregate(x, mask, "mean")
    with pytest.raises(ValueError, match="norm is 0, allowed are positive numbers"):
        aggregate(x, mask, "seq_mean_token_sum_norm", norm=0)
    with pytest.raises(ValueError, match="mask has dtype torch.float32"):
        aggregate(x, mask.float())


# policy_loss


def ratios(*values: float) -> torch.Tensor:
    return f64([math.log(value) for value in values])


def test_policy_loss_matches_hand_worked_tokens() -> None:
    logprobs = torch.cat((ratios(1.5, 1.5, 0.5, 0.5, 1.1), f64([NAN])), dim=1).requires_grad_()
    old = torch.cat((f64([0.0] * 5), f64([-INF])), dim=1)
    advantages = f64([2.0, -2.0, 2.0, -2.0, 3.0, NAN])
    mask = torch.tensor([[True] * 5 + [False]])
    # clip to [0.8, 1.3]: max(-3, -2.6) = -2.6 clipped; max(3, 2.6) = 3; max(-1, -1.6) = -1; max(1, 1.6) = 1.6 clipped;
    # -3.3 inside. Mean of -2.6 + 3 - 1 + 1.6 - 3.3 = -2.3 over 5.
    loss, metrics = policy_loss(logprobs, old, advantages, mask, clip_low=0.2, clip_high=0.3)
    assert loss.item() == pytest.approx(-0.46, rel=1e-12)
    # d loss / d logprob is -A * ratio / 5 where unclipped, 0 where clipped or masked
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([0.0, 0.6, -0.2, 0.0, -0.66, 0.0], rel=1e-12)
    # k3 of KL(old || new) is ratio - 1 - log ratio
    k3 = sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)) / 5
    by_hand = {"clip_fraction": 2 / 5, "ratio_mean": 5.1 / 5, "ratio_max": 1.5, "approx_kl": k3}
    assert {name: metric.item() for name, metric in metrics.items()} == pytest.approx(by_hand, rel=1e-12)
    assert all(metric.shape == () and not metric.requires_grad for metric in metrics.values())


def test_at_ratio_one_the_gradient_is_minus_the_advantage() -> None:
    logprobs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(2, 3, dtype=torch.float64)
    loss, metrics = policy_loss(logprobs, logprobs.detach(), advantages, full_mask(2, 3))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -advantages / 6, rtol=1e-12, atol=0)
    assert metrics["clip_fraction"].item() == metrics["approx_kl"].item() == 0.0


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    logprobs = ratios(10.0, 2.0, 10.0).requires_grad_()
    advantages = f64([-1.0, -1.0, 1.0])
    # -A * ratio: 10 bounded to 3; 2 stays; positive: max(-10, -1.2) = -1.2
    loss, _ = policy_loss(logprobs, torch.zeros_like(logprobs), advantages, full_mask(1, 3), dual_clip=3.0)
    assert loss.item() == pytest.approx((3 + 2 - 1.2) / 3, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([0.0, 2 / 3, 0.0], rel=1e-12)


def test_infinite_log_ratios_stay_finite() -> None:
    logprobs = f64([-INF, 0.0, -900.0]).requires_grad_()
    old = f64([-1.0, -INF, -1.0])
    loss, metrics = policy_loss(logprobs, old, f64([1.0, 1.0, -1.0]), full_mask(1, 3))
    # ratios e^-20, e^20, e^-20: -e^-20, clipped -1.2, clipped 0.8
    assert loss.item() == pytest.approx((-math.exp(-20) - 1.2 + 0.8) / 3, rel=1e-12)
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-12)
    assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()


def test_policy_loss_is_differentiable() -> None:
    logprobs = (0.1 * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    old, advantages = torch.zeros(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.7
    for mode in AGGREGATIONS:
        assert torch.autograd.gradcheck(
            lambda x, mode=mode: policy_loss(x, old, advantages, mask, dual_clip=3.0, aggregation=mode)[0], logprobs
        )


def test_policy_loss_of_an_empty_mask_is_zero() -> None:
    x = torch.full((2, 3), NAN, requires_grad=True)
    loss, metrics = policy_loss(x, x.detach(), x.detach(), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad is not None
    assert x.grad.abs().sum() == 0.0
    assert all(metric.item() == 0.0 for metric in metrics.values())


def test_policy_loss_refuses_bad_arguments() -> None:
    x, mask = torch.zeros(1, 2), full_mask(1, 2)
    with pytest.raises(ValueError, match=r"dual_clip is 1.0, allowed are numbers above 1"):
        policy_loss(x, x, x, mask, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"clip_low is -0.1, allowed are numbers from 0 up"):
        policy_loss(x, x, x, mask, clip_low=-0.1)
    with pytest.raises(ValueError, match=r"advantages has shape \[1\], allowed is the mask's \[1, 2\]"):
        policy_loss(x, x, torch.zeros(1), mask)


# value_loss


def test_value_loss_takes_half_the_larger_square() -> None:
    values = f64([1.0, 1.0, 1.0, NAN]).requires_grad_()
    old = f64([0.5, 0.5, 0.9, NAN])
    returns = f64([2.0, 0.0, 3.0, NAN])
    mask = torch.tensor([[True, True, True, False]])
    # clipped values 0.7, 0.7, 1.0. Squares: 1 against 1.69; 1 against 0.49; 4 either way. 0.5 * (1.69 + 1 + 4) / 3
    loss, metrics = value_loss(values, old, returns, mask, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * 6.69 / 3, rel=1e-12)
    # d/dv of 0.5 (v - R)² / 3 is (v - R) / 3; 0 where the clipped square won
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient[0].tolist() == pytest.approx([0.0, 1 / 3, -2 / 3, 0.0], rel=1e-12)
    assert metrics["value_clip_fraction"].item() == pytest.approx(1 / 3)
    # the values do not vary, so they explain nothing: residual variance equals that of the returns
    assert metrics["explained_variance"].item() == pytest.approx(0.0, abs=1e-12)


def test_value_loss_without_clip_is_half_the_squared_error() -> None:
    # 0.5 * (1 + 9) / 2 = 2.5
    loss, metrics = value_loss(f64([1.0, 5.0]), f64([99.0, 99.0]), f64([2.0, 2.0]), full_mask(1, 2), clip=None)
    assert loss.item() == 2.5
    assert metrics["value_clip_fraction"].item() == 0.0


def test_rounding_within_the_limit_is_not_counted_as_clipping() -> None:
    old = torch.linspace(-1, 1, 1000).reshape(10, 100)
    values = torch.sin(100 * old) / 37
    assert (old + (values - old) != values).any()  # float32 does round here
    _, metrics = value_loss(values, old, torch.zeros_like(old), full_mask(10, 100), clip=2.0)
    assert metrics["value_clip_fraction"].item() == 0.0


def test_explained_variance_matches_hand_worked_values() -> None:
    returns, mask = f64([0.0, 2.0, NAN]), torch.tensor([[True, True, False]])
    # residuals 0 and 1 vary by 1/4; returns by 1: 1 - 1/4
    _, metrics = value_loss(f64([0.0, 1.0, NAN]), f64([0.0, 1.0, NAN]), returns, mask)
    assert metrics["explained_variance"].item() == 0.75
    _, metrics = value_loss(f64([0.0, 1.0]), f64([0.0, 1.0]), f64([3.0, 3.0]), full_mask(1, 2))
    assert metrics["explained_variance"].item() == 0.0


def test_value_loss_is_differentiable_and_splits_into_micro_batches() -> None:
    values, old, returns = torch.randn(3, 4, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask)[0], values.clone().requires_grad_())
    whole, _ = value_loss(values, old, returns, mask)
    parts = [
        value_loss(values[i : i + 1], old[i : i + 1], returns[i : i + 1], mask[i : i + 1], denominator=mask.sum())[0]
        for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def test_value_loss_refuses_a_negative_clip() -> None:
    with pytest.raises(ValueError, match="clip is -1, allowed are numbers from 0 up"):
        value_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), full_mask(1, 1), clip=-1)


# preference_loss


def test_preference_loss_matches_hand_worked_values() -> None:
    chosen = torch.tensor([2.0, 0.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # -log sigmoid(x) = log(1 + e^-x) at 1 and 0
    loss = preference_loss(chosen, rejected)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log(2)) / 2, rel=1e-14)
    # derivative -(1 - sigmoid(x)) / 2
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert gradient.tolist() == pytest.approx([-1 / (1 + math.e) / 2, -0.25], rel=1e-14)


def test_the_margin_is_how_much_the_chosen_score_should_lead() -> None:
    chosen, rejected = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    with_tensor = preference_loss(chosen, rejected, torch.tensor([3.0], dtype=torch.float64))
    # log(1 + e^2) at 1 - 3 = -2
    assert with_tensor.item() == pytest.approx(math.log1p(math.exp(2)), rel=1e-14)
    assert preference_loss(chosen, rejected, 3.0).item() == with_tensor.item()


def test_preference_loss_survives_huge_differences_and_checks_gradients() -> None:
    assert preference_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: preference_loss(s[0], s[1]), scores)


def test_preference_loss_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"rejected has shape \[3\], allowed is that of chosen, \[3, 1\]"):
        preference_loss(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"margin has shape \[3, 1\], allowed is that of chosen, \[3\]"):
        preference_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))
