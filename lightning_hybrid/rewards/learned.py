"""A reward model as a reward: text in, the model's score of the whole text out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.data.reward_texts import RewardTexts
from lightning_hybrid.data.templates import Turns, turns_in
from lightning_hybrid.data.tokenizing import pad_batch
from lightning_hybrid.errors import DataError, RewardError
from lightning_hybrid.models import ScalarModel, max_positions
from lightning_hybrid.rewards.base import Fields, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Read in one forward pass, unless told otherwise.
TEXTS_AT_ONCE = 32
Encoder = Callable[[list[str], list[str], list[Turns | None]], list[list[int]]]


class LearnedReward(Reward):
    """Score each prompt with its response by a reward model, tokenised by the reward model's own tokenizer.

    The tokens are those that the text had in training, which the tokenizer knows of a model that was trained here: see
    :class:`~lightning_hybrid.data.reward_texts.RewardTexts`. Where training texts ended with an EOS or the end of a
    turn, so does the text, whether or not the response ended by itself: endings are priced by ``missing_eos_penalty``,
    not by what the model thinks of a cut text.

    Args:
        model: the reward model.
        tokenizer: its tokenizer, which may differ from the policy's.
        batch_size: texts per forward pass.
        encoder: from prompts, responses and the turns of prompts that have any to token ids, for models that were
            trained on other texts.
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
        self.encoder = encoder or partial(RewardTexts.of(tokenizer).encode, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.name = type(model.model).__name__
        self.batch_size = batch_size
        self.limit = max_positions(model.config)

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> list[list[int]]:
        """Token ids of each whole text.

        Raises:
            RewardError: The chat template refuses a conversation, or one has more tokens than the model has positions.
        """
        try:
            encoded = self.encoder(prompts, responses, turns_in(fields, len(prompts)))
        except DataError as error:
            raise RewardError(
                f"reward model {self.name}: {error}\nto score the text as the policy is shown it, give the model as "
                "reward.classifier with template '{prompt}{response}'"
            ) from error
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
