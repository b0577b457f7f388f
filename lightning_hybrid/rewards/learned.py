"""A reward model as a reward: text in, the model's score of the whole text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.data.tokenizing import encode_texts, pad_batch, with_bos, with_eos
from lightning_hybrid.errors import RewardError
from lightning_hybrid.models import ScalarModel, max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Read in one forward pass, unless told otherwise.
TEXTS_AT_ONCE = 32


class LearnedReward:
    """Score ``prompt + response`` with a reward model, tokenised by the reward model's own tokenizer.

    The text gets a BOS and an EOS like the texts that the reward model was trained on, whether or not the response
    ended by itself: endings are priced by ``missing_eos_penalty``, not by what the model thinks of a cut text.

    Args:
        model: the reward model.
        tokenizer: its tokenizer, which may differ from the policy's.
        batch_size: texts per forward pass.
    """

    def __init__(self, model: ScalarModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = TEXTS_AT_ONCE) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = type(model.model).__name__
        self.batch_size = batch_size
        self.limit = max_positions(model.config)

    def __call__(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Score each response.

        Args:
            prompts: ``batch`` texts.
            responses: ``batch`` texts, each continuing its prompt.

        Returns:
            ``[batch]`` float32 on the CPU.

        Raises:
            RewardError: if a text is longer than the reward model's positions, or its score is not finite.
        """
        return self.score_ids(self.encode(prompts, responses))

    def encode(self, prompts: list[str], responses: list[str]) -> list[list[int]]:
        """Token ids of each whole text; raises a RewardError where one has more than the model has positions."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return [self._ids(row, encoded) for row, encoded in enumerate(encode_texts(self.tokenizer, texts))]

    @torch.no_grad()
    def score_ids(self, ids: list[list[int]]) -> Tensor:
        """Score texts given as token ids, with BOS and EOS; ``[batch]`` float32 on the CPU."""
        scores = torch.cat([self._score(ids[i : i + self.batch_size]) for i in range(0, len(ids), self.batch_size)])
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            text = self.tokenizer.decode(ids[row])
            raise RewardError(f"the reward model scored sample {row} as {scores[row].item()}: text {text[:80]!r}")
        return scores

    def _ids(self, row: int, encoded: list[int]) -> list[int]:
        ids = with_eos(self.tokenizer, with_bos(self.tokenizer, encoded))
        if self.limit is not None and len(ids) > self.limit:
            raise RewardError(
                f"sample {row} has {len(ids)} tokens for the reward model, which has {self.limit} positions: "
                "shorten prompts or rollout.max_new_tokens"
            )
        return ids

    def _score(self, ids: list[list[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        tokens, mask = (x.to(device) for x in pad_batch(ids, 0))
        return self.model.score(tokens, mask).cpu()
