"""Batches of whole texts: put on top of each other, scored, and mismatched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lightning_hybrid.errors import DataError
from lightning_hybrid.models import PolicyOutput
from lightning_hybrid.rl import sequence_logprobs

Scorer = Callable[[Tensor, Tensor, Tensor], PolicyOutput]


class Texts(NamedTuple):
    """Prompts with their responses.

    Attributes:
        input_ids: Long[B, T].
        attention_mask: Bool[B, T], True on tokens.
        loss_mask: Bool[B, T], True on the tokens of the responses and their EOS.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Texts:
        """What a data module batched.

        Raises:
            DataError: if the batch does not say which tokens are the response.
        """
        if "loss_mask" not in batch:
            raise DataError(
                f"a batch has {sorted(batch)} and no 'loss_mask', which marks the tokens of the response: use "
                "PreferenceDataModule or UnpairedDataModule, or add it (Bool[B, T])"
            )
        loss_mask = batch["loss_mask"].clone()
        loss_mask[:, 0] = False  # the first token has no past to be predicted from
        return cls(batch["input_ids"], batch["attention_mask"], loss_mask)

    def above(self, other: Texts) -> Texts:
        """These rows, then the other's; the narrower one is padded on the right."""
        return Texts(*(stacked(*pair) for pair in zip(self, other, strict=True)))

    def logprobs(self, policy: Scorer) -> Tensor:
        """Log-prob of each response, Float[B]: the sum over its tokens."""
        return sequence_logprobs(policy(*self).logprobs, self.loss_mask)


def mismatched(texts: Texts, limit: int | None) -> Texts:
    """Each prompt with the response of the row below it, the last one with the first row's.

    A response begins at the first token that ``loss_mask`` marks.

    Args:
        texts: of one rank.
        limit: tokens that a row may have; None for no limit. What goes beyond is cut off the response.
    """
    parts = [_prompt_and_response(*row) for row in zip(*texts, strict=True)]
    joined = []
    for (prompt, _, _), (_, response, marks) in zip(parts, [*parts[1:], *parts[:1]], strict=True):
        ids = torch.cat([prompt, response])[:limit]
        responded = torch.cat([torch.zeros_like(prompt, dtype=torch.bool), marks])[:limit]
        joined.append((ids, torch.ones_like(responded), responded))
    return Texts(*(pad_sequence(list(column), batch_first=True) for column in zip(*joined, strict=True)))


def _prompt_and_response(ids: Tensor, attended: Tensor, responded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row's prompt, its response and the marks of the response, without padding."""
    ids, marks = ids[attended], responded[attended]
    begin = int(marks.long().argmax()) if bool(marks.any()) else len(marks)
    return ids[:begin], ids[begin:], marks[begin:]


def stacked(first: Tensor, second: Tensor) -> Tensor:
    """Two right-padded batches ``[batch, time]`` on top of each other, the narrower one padded with zeros."""
    width = max(first.shape[1], second.shape[1])
    return torch.cat([F.pad(x, (0, width - x.shape[1])) for x in (first, second)])
