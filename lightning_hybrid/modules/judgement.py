"""What is known of a policy's responses to one held-out prompt, and the figures over all prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_hybrid.config import EvaluationConfig


@dataclass(frozen=True)
class Judgement:
    """A held-out prompt with a greedy response, sampled ones, and the reference's greedy one.

    Attributes:
        index: place of the prompt in its data set.
        prompt: text.
        response: the greedy one's text.
        score: of the greedy response.
        scores: of each sampled response.
        lengths: tokens of each sampled response.
        ended: of each sampled response, whether it ended by itself.
        figures: of the reward, such as the scores of its terms, by name, for each sampled response.
        kl: of each sampled response, nats, to the reference; None without one.
        reference_response: text of the reference's greedy response; None without a reference.
        reference_score: its score.
    """

    index: int
    prompt: str
    response: str
    score: float
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    ended: tuple[bool, ...]
    figures: dict[str, tuple[float, ...]]
    kl: tuple[float, ...] | None = None
    reference_response: str | None = None
    reference_score: float | None = None


def figures_of(judgements: Sequence[Judgement], config: EvaluationConfig) -> dict[str, float]:
    """The figures of an evaluation as they are logged; sums are exact, so the order of the prompts is of no matter."""
    figures = {
        "val/score": _mean(_mean(each.scores) for each in judgements),
        "val/greedy/score": _mean(each.score for each in judgements),
        "val/response_length": _mean(_mean(each.lengths) for each in judgements),
        "val/eos_rate": _mean(_mean(each.ended) for each in judgements),
    }
    for name in judgements[0].figures:
        figures[f"val/reward/{name}"] = _mean(_mean(each.figures[name]) for each in judgements)
    kls = [each.kl for each in judgements if each.kl is not None]
    if kls:
        figures["val/kl"] = _mean(_mean(kl) for kl in kls)
    pairs = [(each.score, each.reference_score) for each in judgements if each.reference_score is not None]
    if pairs:
        figures["val/win_rate"] = _mean(win(mine, other) for mine, other in pairs)
    return figures | _figures_of_several(judgements, config)


def _figures_of_several(judgements: Sequence[Judgement], config: EvaluationConfig) -> dict[str, float]:
    """What the best of several responses would do."""
    figures, k, threshold = {}, config.best_of, config.pass_threshold
    if k > 1:
        figures[f"val/best_of_{k}"] = _mean(expected_best(each.scores, k) for each in judgements)
    if threshold is None:
        return figures
    passed = [[score >= threshold for score in each.scores] for each in judgements]
    for size in sorted({1, k}):
        figures[f"val/pass@{size}"] = _mean(pass_at_k(len(of_one), sum(of_one), size) for of_one in passed)
    return figures


def win(mine: float, other: float) -> float:
    """1 where the first score is the higher one, 0 where the second is, 0.5 where they are equal."""
    return 0.5 if mine == other else float(mine > other)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that of ``k`` responses at least one passes, where ``c`` of ``n`` did.

    The unbiased estimate ``1 - C(n - c, k) / C(n, k)`` (Chen et al. 2021, "Evaluating Large Language Models Trained on
    Code", equation 1).

    Raises:
        ValueError: if ``k`` is not from 1 to ``n``, or ``c`` not from 0 to ``n``.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k of n={n}, c={c}, k={k}: k must be from 1 to n, and c from 0 to n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def expected_best(scores: Sequence[float], k: int) -> float:
    """The mean, over all choices of ``k`` of the scores, of the highest one chosen.

    The ``i``-th smallest of ``n`` (from 1) is the highest of ``C(i - 1, k - 1)`` of the ``C(n, k)`` choices. Of scores
    0 and 1 this is :func:`pass_at_k`.

    Raises:
        ValueError: if ``k`` is not from 1 to the number of scores.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"best of k={k} among {n} scores: k must be from 1 to {n}")
    weighted = (math.comb(i, k - 1) * score for i, score in enumerate(sorted(scores)))
    return math.fsum(weighted) / math.comb(n, k)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
