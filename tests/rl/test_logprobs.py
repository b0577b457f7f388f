from __future__ import annotations

import math

import pytest
import torch

from lightning_hybrid.rl import entropy, gather_logprobs

INF = float("inf")


def test_gathered_logprobs_match_hand_worked_values() -> None:
    # softmax of log 1, log 2, log 5 is 1/8, 2/8, 5/8
    logits = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log().expand(1, 2, 3)
    logprobs = gather_logprobs(logits, torch.tensor([[2, 0]]))
    expected = torch.tensor([[math.log(5 / 8), math.log(1 / 8)]], dtype=torch.float64)
    torch.testing.assert_close(logprobs, expected, rtol=1e-14, atol=0)


def test_half_precision_logits_give_float32_logprobs() -> None:
    logits = torch.tensor([[[0.0, 1.0]]], dtype=torch.bfloat16)
    logprobs = gather_logprobs(logits, torch.tensor([[1]]))
    assert logprobs.dtype == torch.float32
    assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-1)), rel=1e-6)


def test_entropy_matches_hand_worked_values() -> None:
    # uniform over 4: log 4; certain: 0; halves: log 2
    logits = torch.tensor([[0.0] * 4, [0.0, -INF, -INF, -INF], [-INF, 3.0, 3.0, -INF]], dtype=torch.float64)
    expected = torch.tensor([math.log(4), 0.0, math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(entropy(logits), expected, rtol=1e-14, atol=1e-15)


def test_entropy_has_finite_gradients_where_logits_are_minus_infinity() -> None:
    logits = torch.tensor([[0.0, 1.0, -INF]], dtype=torch.float64, requires_grad=True)
    entropy(logits).sum().backward()
    # dH/dx_i = -p_i (log p_i + H); with p = 1/(1+e), e/(1+e) the two are opposite
    p = 1 / (1 + math.e)
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    by_hand = -p * (math.log(p) + h)
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([by_hand, -by_hand, 0.0], rel=1e-12)


def test_entropy_and_logprobs_are_differentiable() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(4, (2, 3))
    assert torch.autograd.gradcheck(entropy, logits)
    assert torch.autograd.gradcheck(lambda x: gather_logprobs(x, tokens), logits)


def test_huge_logits_stay_exact() -> None:
    logits = torch.tensor([[1e6, 1e6]], dtype=torch.float32)
    assert gather_logprobs(logits, torch.tensor([0])).item() == pytest.approx(-math.log(2))
    assert entropy(logits).item() == pytest.approx(math.log(2))


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens has shape \[3\], allowed is \[2\]: one per row"):
        gather_logprobs(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens has dtype torch.int32, allowed is torch.int64"):
        gather_logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32))
