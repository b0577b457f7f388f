"""Instructions: a prompt and the response to learn, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_hybrid.data.checking import Dropped, Problems, report_lost_characters, text_field
from lightning_hybrid.data.tokenizing import LengthRule, encode_texts, pad_batch, with_bos, with_eos

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lightning_hybrid.data.reading import Row


@dataclass(frozen=True)
class Instruction:
    """A prompt (empty where the whole text is the response), its response, and where they were read."""

    prompt: str
    response: str
    where: str

    @property
    def identity(self) -> str:
        """What decides on which side of a validation split the row falls."""
        return f"{self.prompt}\n{self.response}"


@dataclass(frozen=True)
class EncodedInstruction:
    """Token ids of BOS, prompt, response and EOS; the first ``prompt_length`` of them are not to be learned.

    Example:
        ``EncodedInstruction(ids=[1, 40, 41, 50, 2], prompt_length=3)``: BOS, two prompt tokens, one of response, EOS.
    """

    ids: list[int]
    prompt_length: int


def read_instructions(
    rows: Sequence[Row], prompt_key: str | None, response_key: str, problems: Problems
) -> list[Instruction]:
    """Take prompt and response out of each row, noting the rows that lack them."""
    return [
        Instruction(
            prompt="" if prompt_key is None else text_field(row, prompt_key, problems),
            response=text_field(row, response_key, problems),
            where=row.where,
        )
        for row in rows
    ]


def encode_instructions(
    examples: Sequence[Instruction],
    tokenizer: PreTrainedTokenizerBase,
    rule: LengthRule,
    source: str,
    *,
    add_eos: bool = True,
    bos: bool = True,
) -> list[EncodedInstruction]:
    """Tokenise prompt and response apart and join them, as a sampled response is joined to its prompt.

    Args:
        examples: The texts.
        tokenizer: Its tokens for both; special tokens are added here, not by it.
        rule: What to do with rows of too many tokens; truncating cuts the end of the response, and its EOS.
        source: File names, for messages.
        add_eos: End each response with EOS.
        bos: Begin with BOS, where the tokenizer has one.

    Returns:
        The rows that stay, in order.

    Raises:
        DataError: If no row stays, or a row is too long and ``rule.too_long`` is ``error``.
    """
    prompts = encode_texts(tokenizer, [example.prompt for example in examples])
    responses = encode_texts(tokenizer, [example.response for example in examples])
    texts = [text for example in examples for text in (example.prompt, example.response)]
    token_ids = [ids for pair in zip(prompts, responses, strict=True) for ids in pair]
    report_lost_characters(tokenizer, texts, token_ids, source)
    kept, dropped, problems = [], Dropped(source, len(examples)), Problems(source)
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        if not response:
            dropped.add("with an empty response")
            continue
        prompt = with_bos(tokenizer, prompt) if bos else prompt
        ids = prompt + (with_eos(tokenizer, response) if add_eos else response)
        if not rule.keeps(len(ids), example.where, dropped, problems):
            continue
        if rule.room is not None and len(prompt) >= rule.room:
            dropped.add(f"with a prompt that leaves no token of response within max_length {rule.max_length}")
            continue
        kept.append(EncodedInstruction(ids[: rule.room], len(prompt)))
    problems.raise_if_any()
    dropped.report()
    return kept


def collate_instructions(examples: Sequence[EncodedInstruction], fill: int) -> dict[str, Tensor]:
    """Make one batch, padded on the right with the id ``fill``.

    Returns:
        ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T], True on tokens, and ``loss_mask`` Bool[B, T], True on
        the tokens of responses and their EOS.
    """
    input_ids, attention_mask = pad_batch([example.ids for example in examples], fill)
    prompt_lengths = torch.tensor([example.prompt_length for example in examples])
    loss_mask = attention_mask & (torch.arange(input_ids.shape[1]) >= prompt_lengths[:, None])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
