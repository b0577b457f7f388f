"""A reward model as a reward: text in, the model's score of the whole text out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.data.tokenizing import encode_texts, pad_batch, with_bos, with_eos
from lightning_hybrid.errors import RewardError
from lightning_hybrid.models import ScalarModel, max_positions
from lightning_hybrid.rewards.base import Fields, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Read in one forward pass, unless told otherwise.
TEXTS_AT_ONCE = 32
Encoder = Callable[[list[str], list[str]], list[list[int]]]


class LearnedReward(Reward):
    """Score ``prompt + response`` with a reward model, tokenised by the reward model's own tokenizer.

    The text gets a BOS and an EOS like the texts that the reward model was trained on, whether or not the response
    ended by itself: endings are priced by ``missing_eos_penalty``, not by what the model thinks of a cut text.

    Args:
        model: the reward model.
        tokenizer: its tokenizer, which may differ from the policy's.
        batch_size: texts per forward pass.
        encoder: from prompts and responses to token ids, for models that were trained on other texts, such as those of
            a chat template.
    """

    def __init__(
        self,
        model: ScalarModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = TEXTS_AT_ONCE,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.models = {"": model}
        self.encoder = encoder or self._encode_plainly
        self.model = model
        self.tokenizer = tokenizer
        self.name = type(model.model).__name__
        self.batch_size = batch_size
        self.limit = max_positions(model.config)

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> list[list[int]]:
        """Token ids of each whole text; raises a RewardError where one has more than the model has positions."""
        encoded = self.encoder(prompts, responses)
        for row, ids in enumerate(encoded):
            check_length(row, len(ids), self.limit)
        return encoded

    @torch.no_grad()
    def run(self, prepared: list[list[int]]) -> tuple[list[list[int]], Tensor]:
        """The texts again, and the model's scores of them, unchecked."""
        size, device = self.batch_size, next(self.model.parameters()).device
        scores = [torch.zeros(0)]
        for start in range(0, len(prepared), size):
            tokens, mask = (x.to(device) for x in pad_batch(prepared[start : start + size], 0))
            scores.append(self.model.score(tokens, mask).float().cpu())
        return prepared, torch.cat(scores)

    def conclude(self, ran: tuple[list[list[int]], Tensor]) -> Tensor:
        """The scores; raises a RewardError where one is not finite."""
        ids, scores = ran
        check_finite(scores, lambda row: str(self.tokenizer.decode(ids[row])))
        return scores

    def score_ids(self, ids: list[list[int]]) -> Tensor:
        """Score texts given as token ids, with their special tokens; ``[batch]`` float32 on the CPU."""
        return self.conclude(self.run(ids))

    def _encode_plainly(self, prompts: list[str], responses: list[str]) -> list[list[int]]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        encoded = encode_texts(self.tokenizer, texts)
        return [with_eos(self.tokenizer, with_bos(self.tokenizer, ids)) for ids in encoded]


def check_length(row: int, length: int, limit: int | None) -> None:
    """Raise a RewardError for a text with more tokens than a model has positions; None is no limit."""
    if limit is not None and length > limit:
        raise RewardError(
            f"sample {row} has {length} tokens for the reward model, which has {limit} positions: "
            "shorten prompts or rollout.max_new_tokens"
        )


def check_finite(scores: Tensor, text: Callable[[int], str]) -> None:
    """Raise a RewardError that shows the first text with a score that is not finite."""
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        raise RewardError(f"the reward model scored sample {row} as {scores[row].item()}: text {text(row)[:80]!r}")
