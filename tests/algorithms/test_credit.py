"""What each algorithm credits tokens with, against values worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hybrid.algorithms import (
    ALGORITHMS,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    Judged,
    OnlineConfig,
    PPOConfig,
    ReinforcePlusPlusBaselineConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
)
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.rl import whiten

MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [True, True, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0], [-3.0, 0.0, 0.0], [-0.5, -0.5, 0.0]])
REFERENCE = torch.tensor([[-1.5, -2.0, 0.0], [-1.0, -2.0, -1.0], [-3.0, 0.0, 0.0], [-0.5, -0.25, 0.0]])
KL = [0.5, 1.0, 0.0, -0.25]  # of each response: sums of the differences


def judged(**changes: Any) -> Judged:
    held: dict[str, Any] = {
        "scores": torch.tensor([1.0, 3.0, 2.0, 8.0]),
        "group": torch.tensor([0, 0, 1, 1]),
        "mask": MASK,
        "logprobs": LOGPROBS,
        "ref_logprobs": REFERENCE,
        "values": None,
        "kl_coef": 0.0,
        "sum_over_ranks": lambda x: x,
    }
    return Judged(**(held | changes))


def on_tokens(values: list[float]) -> Any:
    return pytest.approx(torch.where(MASK, torch.tensor(values)[:, None], 0.0).flatten().tolist(), abs=1e-6)


@pytest.mark.parametrize("algorithm", [GRPOConfig(), GSPOConfig(), DAPOConfig(), CISPOConfig()], ids=lambda c: c.name)
def test_relatives_of_grpo_give_every_token_the_normalised_difference_to_its_group(algorithm: OnlineConfig) -> None:
    half = 1 / 2**0.5
    assert algorithm.credit(judged()).advantages.flatten().tolist() == on_tokens([-half, half, -half, half])


def test_dr_grpo_leaves_the_differences_as_they_are() -> None:
    assert DrGRPOConfig().credit(judged()).advantages.flatten().tolist() == on_tokens([-1.0, 1.0, -3.0, 3.0])


def test_rloo_compares_scores_less_the_kl_of_the_whole_response() -> None:
    credit = RLOOConfig().credit(judged(kl_coef=2.0))
    worth = [1 - 2 * KL[0], 3 - 2 * KL[1], 2 - 2 * KL[2], 8 - 2 * KL[3]]
    expected = [worth[0] - worth[1], worth[1] - worth[0], worth[2] - worth[3], worth[3] - worth[2]]
    assert credit.advantages.flatten().tolist() == on_tokens(expected)
    assert credit.rewards.sum(1).tolist() == pytest.approx(worth)


def test_reinforce_plus_plus_whitens_the_reward_that_is_still_to_come() -> None:
    credit = ReinforcePlusPlusConfig(gamma=0.5).credit(judged(kl_coef=1.0))
    to_come = torch.tensor(
        [
            [-0.5 + 0.5 * 1.0, 1.0, 0.0],
            [0.5 * (-1.0 + 0.5 * 3.0), -1.0 + 0.5 * 3.0, 3.0],
            [2.0, 0.0, 0.0],
            # The log-ratio of its last token is -0.25, so the penalty pays 0.25 beside the 8.
            [0.5 * 8.25, 8.25, 0.0],
        ]
    )
    assert torch.allclose(credit.advantages, whiten(to_come, MASK), atol=1e-6)


def test_its_baseline_form_whitens_differences_to_the_mean_of_the_group() -> None:
    credit = ReinforcePlusPlusBaselineConfig().credit(judged())
    above = torch.where(MASK, torch.tensor([-1.0, 1.0, -3.0, 3.0])[:, None], 0.0)
    assert torch.allclose(credit.advantages, whiten(above, MASK), atol=1e-6)


def test_ppo_asks_for_the_values_of_a_critic() -> None:
    with pytest.raises(ValueError, match=r"judged\.values is None"):
        PPOConfig().credit(judged())
    assert PPOConfig().credit(judged(values=torch.zeros(4, 3))).returns is not None


def test_without_a_reference_the_rewards_are_the_scores_alone() -> None:
    rewards = RLOOConfig().credit(judged(ref_logprobs=None, kl_coef=5.0)).rewards
    assert rewards.sum(1).tolist() == [1.0, 3.0, 2.0, 8.0]


def test_every_algorithm_is_found_by_its_name_and_by_no_other() -> None:
    assert {name: algorithm().name for name, algorithm in ALGORITHMS.items()} == {name: name for name in ALGORITHMS}
    with pytest.raises(ConfigError, match=r"name = 'grpo': CISPOConfig is 'cispo'"):
        CISPOConfig(name="grpo")


def test_only_ppo_has_a_critic() -> None:
    assert [name for name, algorithm in ALGORITHMS.items() if algorithm.critic] == ["ppo"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kl_estimator": "k1"},
            r"kl_estimator = 'k1': k1 as a loss pulls nowhere \(its mean gradient is 0\): use k2 or",
        ),
        ({"reference": False}, r"reference = False: must be true with kl_coef=0\.04: the KL is to the reference"),
        ({"group_size": 1}, r"group_size = 1: must be greater than or equal to 2"),
        ({"critic_lr": 1e-3}, r"critic_lr = 0\.001: unknown key"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**settings)
