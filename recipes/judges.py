"""Who judges the policies of the quickstart: a preference that no stage of the training has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lightning_hybrid.config import PPORun
from lightning_hybrid.data.task import BEST_GOLD, task_reward
from lightning_hybrid.errors import ConfigError


class Judge(Protocol):
    """Scores responses; higher is better."""

    name: str
    best: float

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One score per response."""
        ...


class GoldJudge:
    """The true preference of the built-in task."""

    name = "gold score"
    best = BEST_GOLD

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Gold scores, in [-1, 1]."""
        return task_reward(prompts, responses)


class SentimentJudge:
    """TF-IDF and logistic regression, trained on the labelled sentences of rt-polarity; 1 for positive, else 0."""

    name = "positive share"
    best = 1.0

    def __init__(self, positive: str, negative: str) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
        except ImportError as error:
            raise ConfigError("the sentiment judge needs scikit-learn: pip install 'lightning-hybrid[test]'") from error
        texts = [Path(path).read_text(encoding="latin-1").strip("\n").split("\n") for path in (positive, negative)]
        self.classifier = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(C=4.0, max_iter=1000)
        )
        self.classifier.fit(texts[0] + texts[1], [1] * len(texts[0]) + [0] * len(texts[1]))

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """1.0 where prompt and response together read as positive."""
        whole = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return [float(label) for label in self.classifier.predict(whole)]


# Name of the stages → the judge, made from the configuration of the PPO stage.
JUDGES: dict[str, Callable[[PPORun], Judge]] = {
    "quickstart": lambda run: GoldJudge(),
    "movie_sentiment": lambda run: SentimentJudge(*run.data.path),
}
