"""Versions of the weights travel with the tokens that they drew."""

from __future__ import annotations

import torch

from lightning_hybrid.generation import Rollout, join


def rollout(prompt: list[int], response: list[int], versions: list[int] | None) -> Rollout:
    """One response; ``versions`` of its tokens."""
    tokens = torch.tensor([prompt + response])
    asked = torch.tensor([[True] * len(prompt) + [False] * len(response)])
    nothing = torch.zeros(tokens.shape)
    drawn = None if versions is None else torch.tensor([[0] * len(prompt) + versions])
    return Rollout(tokens, asked, ~asked, nothing, nothing, ("eos",), versions=drawn)


def test_joined_rollouts_keep_the_versions_of_their_tokens() -> None:
    both = join([rollout([5, 6], [8, 2], [3, 4]), rollout([7], [9, 9, 2], [4, 4, 5])])
    assert both.versions is not None
    assert both.versions.tolist() == [[0, 0, 3, 4, 0], [0, 0, 4, 4, 5]]
    assert both.versions[both.response_mask].tolist() == [3, 4, 4, 4, 5]


def test_rows_of_a_rollout_keep_the_versions_of_their_tokens() -> None:
    both = join([rollout([5, 6], [8, 2], [3, 4]), rollout([7], [9, 9, 2], [4, 4, 5])])
    picked, first, copied = both.pick([1, 0]), both.rows(0, 1), both.usable_in_training()
    assert picked.versions is not None
    assert first.versions is not None
    assert copied.versions is not None
    assert picked.versions.tolist() == [[0, 0, 4, 4, 5], [0, 0, 3, 4, 0]]
    assert first.versions.tolist() == [[0, 0, 3, 4]]
    assert copied.versions.tolist() == both.versions.tolist()


def test_rollouts_of_the_weights_of_now_have_no_versions() -> None:
    assert join([rollout([5], [8], None), rollout([7], [2], None)]).versions is None
