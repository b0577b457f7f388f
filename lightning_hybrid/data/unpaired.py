"""Single responses, each desirable or not, for methods that learn from such labels without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from lightning_hybrid.data.checking import Dropped, Problems
from lightning_hybrid.data.encoding import EncodedText
from lightning_hybrid.data.fields import label_field, text_field
from lightning_hybrid.data.instructions import collate_instructions
from lightning_hybrid.data.preferences import LabelledResponse, TextEncoder
from lightning_hybrid.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_hybrid.data.reading import Row


@dataclass(frozen=True)
class EncodedResponse:
    """Token ids of BOS, prompt, response and EOS, and whether such a response is desired.

    Example:
        ``EncodedResponse(EncodedText([1, 40, 50, 2], [False, False, True, True]), desirable=True)``
    """

    text: EncodedText
    desirable: bool

    def __len__(self) -> int:
        """Tokens of prompt and response."""
        return len(self.text)


def read_unpaired(
    rows: Sequence[Row], prompt_key: str | None, response_key: str, label_key: str, problems: Problems
) -> list[LabelledResponse]:
    """Take prompt, response and label (true or false, 1 or 0) out of each row, noting what is missing."""
    return [
        LabelledResponse(
            prompt="" if prompt_key is None else text_field(row, prompt_key, problems),
            response=text_field(row, response_key, problems),
            desirable=label_field(row, label_key, problems),
            where=row.where,
        )
        for row in rows
    ]


def encode_unpaired(
    examples: Sequence[LabelledResponse], encoder: TextEncoder, dropped: Dropped
) -> list[EncodedResponse]:
    """Tokenise labelled responses.

    Returns:
        The responses that stay, in order; empty and too long ones are left out, and counted.

    Raises:
        DataError: If none stays, or one is too long and the rule is ``error``, or the chat template refuses one or is
            missing.
    """
    kept, problems = [], Problems(dropped.source)
    asked = [(example.prompt, example.response) for example in examples]
    encoded = encoder.answers.answers(asked, [example.where for example in examples], problems)
    problems.raise_if_any()
    for example, whole in zip(examples, encoded, strict=True):
        if not whole.ids:
            dropped.add("with an empty response")
        elif encoder.rule.keeps(len(whole), example.where, dropped, problems):
            kept.append(EncodedResponse(encoder.cut(whole), example.desirable))
    problems.raise_if_any()
    dropped.report()
    return kept


def refuse_one_label(responses: Sequence[EncodedResponse] | Dataset[EncodedResponse], source: str) -> None:
    """Raise a `DataError` where all responses have one label: there is nothing to tell apart.

    They are looked at in any order until both labels were met: of a stream few are read, also where it is sorted.
    """
    count = len(responses)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    first = bool(responses[order[0]].desirable) if count else True
    if all(responses[index].desirable == first for index in order):
        desirable = count if first else 0
        raise DataError(
            f"responses of both labels are needed, but {source} has {desirable:,} desirable and "
            f"{count - desirable:,} undesirable ones"
        )


def collate_unpaired(examples: Sequence[EncodedResponse], fill: int) -> dict[str, Tensor]:
    """Make one batch, padded on the right with the id ``fill``.

    Returns:
        ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T], True on tokens, ``loss_mask`` Bool[B, T], True on the
        response and its EOS, and ``desirable`` Bool[B].
    """
    batch = collate_instructions([example.text for example in examples], fill)
    return batch | {"desirable": torch.tensor([example.desirable for example in examples])}
