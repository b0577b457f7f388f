from __future__ import annotations

import math

import pytest
import torch

from lightning_hybrid.rl import AdaptiveKLController, FixedKLController, KLController, RunningMoments, moments


def test_the_adaptive_controller_follows_the_error_and_clips_it() -> None:
    controller = AdaptiveKLController(init=0.1, target=6.0, horizon=1000)
    controller.update(current_kl=6.6, n_steps=100)  # error 0.1: 0.1 * (1 + 0.1 * 100 / 1000) = 0.101
    assert controller.value == pytest.approx(0.101, rel=1e-12)
    controller.update(current_kl=600.0, n_steps=100)  # error clipped to 0.2: times 1.02
    assert controller.value == pytest.approx(0.101 * 1.02, rel=1e-12)
    controller.update(current_kl=-5.0, n_steps=100)  # error clipped to -0.2: times 0.98
    assert controller.value == pytest.approx(0.101 * 1.02 * 0.98, rel=1e-12)


def test_controllers_go_on_from_a_checkpoint() -> None:
    adaptive = AdaptiveKLController(0.1, 6.0, 1000)
    adaptive.update(10.0, 50)
    restored: KLController = AdaptiveKLController(0.5, 6.0, 1000)
    restored.load_state_dict(adaptive.state_dict())
    assert restored.value == adaptive.value
    fixed: KLController = FixedKLController(0.3)
    fixed.load_state_dict(adaptive.state_dict())
    fixed.update(10.0, 50)
    assert fixed.value == 0.3
    restored.load_state_dict(fixed.state_dict())
    assert restored.value == 0.3


def test_controllers_refuse_bad_numbers() -> None:
    with pytest.raises(ValueError, match="target of the adaptive KL controller is 0.0, allowed are positive numbers"):
        AdaptiveKLController(0.1, 0.0, 1000)
    with pytest.raises(ValueError, match="the KL coefficient is -1"):
        FixedKLController(-1)
    controller = AdaptiveKLController(0.1, 6.0, 100)
    with pytest.raises(ValueError, match="current_kl is nan"):
        controller.update(float("nan"), 1)
    with pytest.raises(ValueError, match="n_steps is 500 with a horizon of 100, .*raise the horizon"):
        controller.update(1.0, 500)
    assert controller.value == 0.1


def test_moments_match_hand_worked_values() -> None:
    # mean (1 + 2 + 6) / 3 = 3; squares 4 + 1 + 9 = 14
    assert moments(torch.tensor([1.0, 2.0, 6.0])).tolist() == [3.0, 3.0, 14.0]
    assert moments(torch.tensor([])).tolist() == [0.0, 0.0, 0.0]


def test_merged_moments_equal_those_of_all_the_data() -> None:
    x = torch.randn(50, dtype=torch.float64) * 3 + 1000
    running = RunningMoments()
    for chunk in (x[:1], x[1:1], x[1:20], x[20:]):
        running.update(*moments(chunk).tolist())
    assert running.count == 50
    assert running.mean == pytest.approx(x.mean().item(), rel=1e-12)
    assert running.std == pytest.approx(x.std().item(), rel=1e-9)
    torch.testing.assert_close(running.normalize(x), (x - x.mean()) / (x.var() + 1e-8).sqrt(), rtol=1e-9, atol=1e-9)


def test_before_two_numbers_only_the_mean_is_taken_away() -> None:
    running = RunningMoments()
    assert running.std == 1.0
    running.update(*moments(torch.tensor([5.0])).tolist())
    assert running.normalize(torch.tensor([5.0, 6.0])).tolist() == pytest.approx([0.0, 1.0])


def test_equal_rewards_normalize_to_zero() -> None:
    running = RunningMoments()
    running.update(*moments(torch.full((4,), 2.0)).tolist())
    assert running.normalize(torch.full((2,), 2.0)).tolist() == [0.0, 0.0]


def test_numbers_that_are_all_equal_are_not_scaled_up() -> None:
    running = RunningMoments()
    running.update(*moments(torch.full((64,), 0.1)).tolist())
    assert running.scale == 1.0
    running.update(*moments(torch.tensor([1e-3, 0.2])).tolist())
    assert running.scale == running.std < 0.1


def test_running_moments_go_on_from_a_checkpoint() -> None:
    running, restored = RunningMoments(), RunningMoments()
    running.update(*moments(torch.tensor([1.0, 2.0, 6.0])).tolist())
    restored.load_state_dict(running.state_dict())
    assert (restored.count, restored.mean, restored.std) == (3.0, 3.0, math.sqrt(7.0))


def test_running_moments_refuse_what_would_poison_them() -> None:
    running = RunningMoments()
    with pytest.raises(ValueError, match="moments are count=2.0, mean=nan, m2=0.0"):
        running.update(2.0, float("nan"), 0.0)
    assert running.count == 0.0
