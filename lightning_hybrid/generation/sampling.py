"""How responses are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_hybrid.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn from the policy.

    The logits are shaped in this order: ``repetition_penalty``, ``min_new_tokens``, ``temperature``, ``top_k``,
    ``top_p``, ``min_p``.

    Attributes:
        max_new_tokens: tokens that a response may have.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: draw among the k most probable tokens; 0 for all.
        top_p: draw among the most probable tokens of this total probability, in (0, 1] (Holtzman et al. 2020).
        min_p: draw among tokens at least this probable relative to the most probable one, in [0, 1].
        n: responses per prompt; they share one reading of the prompt.
        stop: texts that end a response; the token that completes one is kept. They need a tokenizer.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the prompt or the response
            holds already (Keskar et al. 2019); 1 for none.
        min_new_tokens: tokens that a response has before it may end.
        eos_ids: tokens that end a response; None for those of the model's generation configuration.
        entropy: also give the entropy of the policy at each token.

    Raises:
        ConfigError: naming every value that cannot be.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] | None = None
    entropy: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.eos_ids is not None:
            object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        broken = [(name, allowed) for name, right, allowed in self._rules() if not right]
        wrong = [f"{name} is {getattr(self, name)!r}: must be {allowed}" for name, allowed in broken]
        if wrong:
            raise ConfigError("sampling parameters: " + "; ".join(wrong))

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (most probable token) or above"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("n", self.n >= 1, "at least 1"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            (
                "min_new_tokens",
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"between 0 and max_new_tokens ({self.max_new_tokens})",
            ),
        ]

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0
