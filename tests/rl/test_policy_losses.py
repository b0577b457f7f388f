"""Ratios of whole sequences, and clipped importance weights, against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_hybrid.rl import cispo_loss, policy_loss

MASK = torch.tensor([[True, True, False, True], [False, True, True, False]])
OLD = torch.tensor([[-1.0, -2.0, 9.0, -0.5], [7.0, -1.5, -1.0, 0.0]], dtype=torch.float64)
CHANGE = torch.tensor([[0.3, -0.1, 5.0, 0.1], [5.0, -0.4, -0.2, 5.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0, 2.0, 8.0, 2.0], [8.0, -1.0, -1.0, 8.0]], dtype=torch.float64)


def changed() -> Tensor:
    return (OLD + CHANGE).requires_grad_()


def test_at_the_level_of_sequences_the_ratio_is_that_of_the_mean_log_ratio() -> None:
    first, second = math.exp(0.1), math.exp(-0.3)
    loss, metrics = policy_loss(
        changed(), OLD, ADVANTAGES, MASK, 0.9, 9.0, level="sequence", aggregation="seq_mean_token_mean"
    )
    assert loss.item() == pytest.approx((-2 * first + second) / 2, rel=1e-12)
    assert float(metrics["ratio_mean"]) == pytest.approx((3 * first + 2 * second) / 5, rel=1e-12)


def test_a_clipped_sequence_gives_no_gradient_and_the_others_share_theirs_over_their_tokens() -> None:
    logprobs = changed()
    loss, metrics = policy_loss(
        logprobs, OLD, ADVANTAGES, MASK, 0.05, 0.5, level="sequence", aggregation="seq_mean_token_mean"
    )
    loss.backward()
    assert logprobs.grad is not None
    share = -2 * math.exp(0.1) / 3 / 2
    assert logprobs.grad.tolist() == [
        [pytest.approx(share), pytest.approx(share), 0.0, pytest.approx(share)],
        [0.0] * 4,
    ]
    assert float(metrics["clip_fraction"]) == pytest.approx(2 / 5)


def test_one_token_is_a_sequence_of_its_own_at_either_level() -> None:
    one = torch.ones(4, 1, dtype=torch.bool)
    logprobs, old, advantages = (torch.randn(4, 1, generator=torch.Generator().manual_seed(i)) for i in range(3))
    by_token, _ = policy_loss(logprobs, old, advantages, one)
    by_sequence, _ = policy_loss(logprobs, old, advantages, one, level="sequence")
    assert torch.equal(by_token, by_sequence)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level is 'word', allowed are token, sequence"):
        policy_loss(OLD, OLD, ADVANTAGES, MASK, level="word")


def test_cispo_weighs_log_probs_by_the_clipped_ratio_without_a_gradient_through_it() -> None:
    logprobs = changed()
    loss, metrics = cispo_loss(logprobs, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.2)
    ratios = [min(max(math.exp(c), 0.8), 1.2) for c in (0.3, -0.1, 0.1, -0.4, -0.2)]
    tokens = [-0.7, -2.1, -0.4, -1.9, -1.2]
    signs = [2.0, 2.0, 2.0, -1.0, -1.0]
    expected = -sum(r * a * p for r, a, p in zip(ratios, signs, tokens, strict=True)) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert logprobs.grad is not None
    of_tokens = [-r * a / 5 for r, a in zip(ratios, signs, strict=True)]
    assert logprobs.grad[MASK].tolist() == pytest.approx(of_tokens, rel=1e-12)
    assert logprobs.grad[~MASK].tolist() == [0.0, 0.0, 0.0]
    assert float(metrics["clip_fraction"]) == pytest.approx(2 / 5)  # e^0.3 and e^-0.4; e^-0.2 is within


def test_cispo_on_fresh_experience_has_the_gradient_of_ppo() -> None:
    gradients = []
    for loss_of in (policy_loss, cispo_loss):
        logprobs = OLD.clone().requires_grad_()
        loss_of(logprobs, OLD, ADVANTAGES, MASK)[0].backward()
        gradients.append(logprobs.grad)
    assert gradients[0] is not None
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-12)


@pytest.mark.parametrize("loss_of", [policy_loss, cispo_loss])
def test_what_lies_behind_the_mask_reaches_neither_loss_nor_gradient(loss_of: object) -> None:
    hidden = torch.where(MASK, OLD + CHANGE, torch.nan).requires_grad_()
    loss, _ = loss_of(hidden, OLD, ADVANTAGES.masked_fill(~MASK, torch.inf), MASK)  # type: ignore[operator]
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
