"""Responses as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hybrid.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode_responses(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """Text of each response, such that ``prompt text + response text`` is the text of both together.

    Decoded alone, a response would lose the space before its first word with many tokenizers.
    """
    prompts = tokenizer.batch_decode(rollout.prompts, skip_special_tokens=True)
    both = [prompt + response for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)]
    whole = tokenizer.batch_decode(both, skip_special_tokens=True)
    return [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]
