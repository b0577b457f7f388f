from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hybrid.rl import gae, token_rewards

NAN = float("nan")


def f64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def plain_gae(
    rewards: list[float], values: list[float], mask: list[bool], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One row, by the definition: drop the holes, take the λ-weighted sum of later errors, put the holes back."""
    valid = [t for t, counts in enumerate(mask) if counts]
    r, v = [rewards[t] for t in valid], [values[t] for t in valid]
    errors = [r[i] + gamma * (v[i + 1] if i + 1 < len(v) else 0.0) - v[i] for i in range(len(v))]
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for i, t in enumerate(valid):
        advantages[t] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(errors)))
        returns[t] = advantages[t] + v[i]
    return advantages, returns


def test_gae_matches_a_hand_worked_row_with_a_hole() -> None:
    rewards = f64([1.0, NAN, 2.0, 77.0])
    values = f64([0.5, NAN, 1.0, 88.0])
    mask = torch.tensor([[True, False, True, False]])
    # gamma 0.5, lam 0.5. Token 2: 2 + 0 - 1 = 1. Token 0: (1 + 0.5 * 1 - 0.5) + 0.25 * 1 = 1.25.
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.25, 0.0, 1.0, 0.0]]
    assert returns.tolist() == [[1.75, 0.0, 2.0, 0.0]]
    assert advantages.dtype == returns.dtype == torch.float64


def test_gae_with_lambda_one_returns_the_discounted_rewards_to_go() -> None:
    # returns 3; 2 + 0.5 * 3 = 3.5; 1 + 0.5 * 3.5 = 2.75, whatever the values
    _, returns = gae(f64([1.0, 2.0, 3.0]), f64([9.0, -4.0, 0.25]), torch.ones(1, 3, dtype=torch.bool), 0.5, 1.0)
    assert returns.tolist() == [[2.75, 3.5, 3.0]]


def test_gae_of_a_single_token_is_reward_minus_value() -> None:
    advantages, returns = gae(f64([3.0]), f64([1.0]), torch.tensor([[True]]), 0.9, 0.9)
    assert (advantages.item(), returns.item()) == (2.0, 3.0)


def test_gae_of_an_all_masked_row_is_zero_and_leaves_the_others_alone() -> None:
    mask = torch.tensor([[False, False], [True, True]])
    advantages, returns = gae(f64([NAN, NAN], [0.0, 1.0]), f64([NAN, NAN], [0.0, 0.0]), mask, 1.0, 1.0)
    assert advantages.tolist() == returns.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_gae_of_no_time_steps_is_empty() -> None:
    advantages, returns = gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 1.0, 1.0)
    assert advantages.shape == returns.shape == (2, 0)


numbers = st.floats(-10, 10)
fractions = st.floats(0, 1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]], list[list[bool]]]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 7))

    def matrix(cell: st.SearchStrategy) -> st.SearchStrategy:
        return st.lists(st.lists(cell, min_size=columns, max_size=columns), min_size=rows, max_size=rows)

    return draw(matrix(numbers)), draw(matrix(numbers)), draw(matrix(st.booleans()))


@settings(max_examples=100, deadline=None)
@given(batches(), fractions, fractions)
def test_gae_equals_the_definition_under_any_mask(batch: tuple, gamma: float, lam: float) -> None:
    rewards, values, mask = batch
    advantages, returns = gae(f64(*rewards), f64(*values), torch.tensor(mask), gamma, lam)
    expected = [plain_gae(*row, gamma, lam) for row in zip(rewards, values, mask, strict=True)]
    torch.testing.assert_close(advantages, f64(*(a for a, _ in expected)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returns, f64(*(r for _, r in expected)), rtol=1e-9, atol=1e-9)


def test_gae_is_differentiable_and_holes_get_no_gradient() -> None:
    rewards = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    assert torch.autograd.gradcheck(lambda r, v: gae(r, v, mask, 0.9, 0.8), (rewards, values))
    gae(rewards, values, mask, 0.9, 0.8)[1].sum().backward()
    assert rewards.grad is not None
    assert rewards.grad[~mask].abs().sum() == 0


def test_gae_refuses_values_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"values has shape \[1, 3\], allowed is the mask's \[1, 2\]"):
        gae(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"mask has shape \[2\], allowed is \[batch, time\]"):
        gae(torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.bool), 1.0, 1.0)


def test_token_rewards_charge_every_token_and_pay_the_last_valid_one() -> None:
    scores = torch.tensor([9.0, -2.0, 5.0], dtype=torch.float64)
    logprobs = f64([-1.0, -2.0, NAN, -1.0], [-1.0, NAN, NAN, NAN], [NAN, NAN, NAN, NAN])
    reference = f64([-1.5, -1.0, NAN, -1.0], [-3.0, NAN, NAN, NAN], [NAN, NAN, NAN, NAN])
    mask = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])
    # k1: 0.5, -1, -, 0 and 2; priced at -0.5: -0.25, 0.5, -, 0 and -1; 9 is clipped to 4; the empty row gets nothing
    rewards = token_rewards(scores, logprobs, reference, mask, kl_coef=0.5, clip=4.0)
    assert rewards.tolist() == [[-0.25, 0.5, 0.0, 4.0], [-3.0, 0.0, 0.0, 0.0], [0.0] * 4]
    unclipped = token_rewards(scores, logprobs, reference, mask, kl_coef=0.5)
    assert unclipped[0].tolist() == [-0.25, 0.5, 0.0, 9.0]


def test_token_rewards_bound_the_charge_where_a_log_ratio_is_infinite() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards = token_rewards(torch.zeros(1), f64([-1.0, -1.0]), f64([-float("inf"), -1000.0]), mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, f64([-2.0, -2.0]))


def test_token_rewards_refuse_bad_arguments() -> None:
    tokens, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"scores has shape \[2, 1\], allowed is \[2\]: one per sequence"):
        token_rewards(torch.zeros(2, 1), tokens, tokens, mask, 0.1)
    with pytest.raises(ValueError, match=r"clip is -1.0, allowed are positive numbers and None"):
        token_rewards(torch.zeros(2), tokens, tokens, mask, 0.1, clip=-1.0)
