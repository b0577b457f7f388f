"""Texts that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_hybrid.errors import ConfigError


class StopTexts:
    """Finds, after each token, whether a response has completed one of the texts.

    Only the last few tokens are decoded: a text of n UTF-8 bytes lies within n + 1 tokens, each of which is a byte
    at least.

    Args:
        texts: that end a response.
        tokenizer: decodes.

    Raises:
        ConfigError: if there are texts and no tokenizer.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        if texts and tokenizer is None:
            raise ConfigError(f"stop={list(texts)!r} needs a tokenizer to tell texts in tokens: give tokenizer=")
        self.texts = list(texts)
        self.tokenizer = tokenizer
        self.window = max((len(text.encode()) for text in texts), default=0) + 1

    def __bool__(self) -> bool:
        return bool(self.texts)

    def completed(self, responses: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each response, of which the last token is new, completes a text."""
        tails = [list(response[-self.window :]) for response in responses]
        completed = self._held(tails)
        hits = [row for row, held in enumerate(completed) if held]
        # Where a text was there without the last token already, it ended before a response was allowed to.
        for row, held in zip(hits, self._held([tails[row][:-1] for row in hits]), strict=True):
            completed[row] = not held
        return completed

    def _held(self, tails: list[list[int]]) -> list[bool]:
        """Whether each of the decoded tails holds a text."""
        if not tails:
            return []
        decoded = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        return [any(text in tail for text in self.texts) for tail in decoded]
