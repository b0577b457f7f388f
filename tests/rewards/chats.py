"""A small tokenizer whose tokens span the border of prompt and answer, with those of ChatML; and rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_hybrid.rollout import Rollout

TEXTS = [
    "the answer is good",
    "the soup is good and the day is bad",
    "is it good? it is good",
    "all is bad, he said",
] * 8


def byte_pairs(bos: bool = True) -> Any:
    """Pairs of bytes merged within words, spaces in front; ``bos``: with a BOS that it also adds by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<|im_start|>", "<|im_end|>"]
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    own.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    own.train_from_iterator(TEXTS, trainer)
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    if bos:
        names["bos_token"] = "<s>"
        own.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=own, **names)
    made.add_special_tokens({"additional_special_tokens": special[3:]})
    return made


def said(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rollout:
    """A rollout of given tokens that ended by itself."""
    before, after = max(map(len, prompts)), max(map(len, responses))
    tokens = torch.zeros(len(prompts), before + after, dtype=torch.long)
    prompt_mask, response_mask = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        prompt_mask[row, before - len(prompt) : before] = True
        response_mask[row, before : before + len(response)] = True
        tokens[row, prompt_mask[row] | response_mask[row]] = torch.tensor([*prompt, *response])
    nothing = torch.zeros(tokens.shape)
    return Rollout(tokens, prompt_mask, response_mask, nothing, nothing, ("eos",) * len(prompts))
