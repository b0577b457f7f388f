"""Batches of whole texts: stacked, scored and mismatched as their rows alone would be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_hybrid.errors import DataError
from lightning_hybrid.modules.means import Means
from lightning_hybrid.modules.sequences import Texts, mismatched
from tests.helpers import tiny_policy

PAD = 0


def texts(*rows: tuple[list[int], list[int]], left: int = 0) -> Texts:
    """Prompts and responses, padded on the right; ``left`` columns of padding before them all."""
    width = max(len(prompt) + len(response) for prompt, response in rows) + left
    shape = (len(rows), width)
    ids, attended, responded = torch.full(shape, PAD), torch.zeros(shape).bool(), torch.zeros(shape).bool()
    for row, (prompt, response) in enumerate(rows):
        end = left + len(prompt) + len(response)
        ids[row, left:end] = torch.tensor(prompt + response)
        attended[row, left:end] = True
        responded[row, left + len(prompt) : end] = True
    return Texts(ids, attended, responded)


def as_rows(batch: Texts) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses without padding."""
    return [
        (ids[attended & ~responded].tolist(), ids[attended & responded].tolist())
        for ids, attended, responded in zip(*batch, strict=True)
    ]


def test_each_prompt_gets_the_response_of_the_row_below() -> None:
    batch = texts(([1, 5], [6, 2]), ([1, 7, 8, 9], [10, 11, 12, 2]), ([1], [13, 2]))
    assert as_rows(mismatched(batch, None)) == [
        ([1, 5], [10, 11, 12, 2]),
        ([1, 7, 8, 9], [13, 2]),
        ([1], [6, 2]),
    ]


def test_padding_on_either_side_is_left_out_of_what_is_mismatched() -> None:
    batch = texts(([1, 5], [6, 2]), ([1], [7, 8, 9, 2]), left=3)
    others = mismatched(batch, None)
    assert as_rows(others) == [([1, 5], [7, 8, 9, 2]), ([1], [6, 2])]
    assert others.input_ids.shape == (2, 6)


def test_what_does_not_fit_is_cut_off_the_response() -> None:
    batch = texts(([1, 5, 6, 7], [8, 2]), ([1], [9, 10, 11, 2]))
    assert as_rows(mismatched(batch, 6)) == [([1, 5, 6, 7], [9, 10]), ([1], [8, 2])]
    assert as_rows(mismatched(batch, 3)) == [([1, 5, 6], []), ([1], [8, 2])]


def test_a_single_row_is_mismatched_with_itself() -> None:
    batch = texts(([1, 5], [6, 2]))
    assert as_rows(mismatched(batch, None)) == as_rows(batch)


def test_tokens_within_a_response_that_do_not_count_move_with_it() -> None:
    batch = texts(([1, 5], [6, 7, 2]), ([1], [8, 9, 2]))
    batch.loss_mask[0, 3] = False  # what a tool said, or another turn's template
    others = mismatched(batch, None)
    kept = others.attention_mask[1]
    assert others.input_ids[1][kept].tolist() == [1, 6, 7, 2]
    assert others.loss_mask[1][kept].tolist() == [False, True, False, True]


def test_log_probs_of_responses_are_those_of_the_rows_alone() -> None:
    policy = tiny_policy().eval()
    rows = (([1, 5], [6, 2]), ([1, 7, 8], [9, 10, 11, 12, 2]), ([1], [13, 2]))
    batch = texts(rows[0]).above(texts(*rows[1:]))
    expected = [_sum_of_logprobs(policy.model(torch.tensor([p + r])).logits[0], p, r) for p, r in rows]
    torch.testing.assert_close(batch.logprobs(policy), torch.stack(expected))


def _sum_of_logprobs(logits: Tensor, prompt: list[int], response: list[int]) -> Tensor:
    logp = logits.float().log_softmax(-1)
    return sum((logp[len(prompt) + i - 1, token] for i, token in enumerate(response)), torch.zeros(()))


def test_the_first_token_never_counts() -> None:
    batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).bool()}
    batch["loss_mask"] = torch.ones(1, 2).bool()
    assert Texts.of(batch).loss_mask.tolist() == [[False, True]]
    assert batch["loss_mask"].all()  # the batch stays as it was


def test_a_batch_that_does_not_mark_responses_is_refused() -> None:
    with pytest.raises(DataError, match=r"a batch has \['attention_mask', 'input_ids'\] and no 'loss_mask'"):
        Texts.of({"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1).bool()})


def test_means_weigh_rows_alike_whatever_batch_they_were_in() -> None:
    means = Means(["all", "some", "none"])
    assert means.means() == {}
    for rows, some in (([1.0, 2.0, 3.0], [10.0]), ([6.0], [])):
        means.add(means.pack({"all": torch.tensor(rows), "some": torch.tensor(some), "none": torch.tensor([])}))
    assert means.means() == {"all": 3.0, "some": 10.0}
    means.clear()
    assert means.packed is None
