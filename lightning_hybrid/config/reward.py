"""Settings of the reward: where scores come from, alone or as a weighted sum of several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings

LONGEST_PAUSE = 60.0  # seconds, between two tries of an endpoint
SOURCES = ("path", "classifier", "function", "url", "verify", "format", "penalty")
# Logged as reward/<name> already, for the whole.
TAKEN = ("score", "score_std", "entered")
TermName = Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _template_has_a_response(config: ClassifierConfig) -> Problem | None:
    remedy = "must be chat, or a text that holds {response} and may hold {prompt}, such as {prompt}{response}"
    problem = Problem("template", remedy, repr(config.template))
    if config.template == "chat":
        return None
    try:
        names = [name for _, name, _, _ in Formatter().parse(config.template) if name is not None]
    except ValueError:  # a brace that is not closed
        return problem
    return None if "response" in names and {*names} <= {"prompt", "response"} else problem


class ClassifierConfig(Settings):
    """A Hugging Face sequence classifier, encoder or decoder, read with its own tokenizer."""

    rules: ClassVar[tuple[Rule, ...]] = (_template_has_a_response,)

    path: str
    """folder or hub name of the classifier"""
    label: str | NonNegativeInt | None = None
    """the label that counts, by name or index; null for the only one"""
    output: Literal["logit", "probability", "log_odds"] = "logit"
    """the label's logit, its probability, or log(probability / (1 - probability))"""
    template: str = "{prompt}{response}"
    """the text that is judged; chat for the template of the classifier's own tokenizer, around the turns of a prompt"""
    batch_size: PositiveInt = 32
    """texts of one forward pass"""


def sources_of(config: RewardTermConfig) -> dict[str, Any]:
    """The sources of scores that are given, by their keys."""
    return {name: value for name in SOURCES if (value := getattr(config, name)) is not None}


def _exactly_one(given: Mapping[str, Any], remedy: str) -> Problem | None:
    if len(given) == 1:
        return None
    listed = [f"{name} {value!r}" for name, value in given.items()]
    return Problem("path", remedy, " beside ".join(listed).removeprefix("path ") or "nothing")


def _term_has_one_source(config: WeightedTermConfig) -> Problem | None:
    """Each term takes its scores from exactly one place."""
    return _exactly_one(sources_of(config), f"give exactly one of {', '.join(SOURCES)}")


def _format_is_a_pattern(config: RewardTermConfig) -> Problem | None:
    try:
        re.compile(config.format or "")
    except (re.error, RecursionError, OverflowError) as error:
        return Problem("format", f"is no regular expression of Python: {error}", repr(config.format))
    return None


def _fields_are_sent_somewhere(config: RewardTermConfig) -> Problem | None:
    if not config.send_fields or config.url is not None:
        return None
    remedy = "columns are sent to an endpoint: give url (a function names the columns as its parameters)"
    return Problem("send_fields", remedy, repr(config.send_fields))


class RewardTermConfig(Settings):
    """One source of scores."""

    rules: ClassVar[tuple[Rule, ...]] = (_format_is_a_pattern, _fields_are_sent_somewhere)

    path: str | None = None
    """folder or hub name of a reward model"""
    classifier: ClassifierConfig | None = None
    """a sequence classifier of any family, with a label, an output and a template"""
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """a function of prompts, responses and columns named by its parameters, written 'package.module:function'"""
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """an endpoint that takes {"prompts": [...], "responses": [...]} and answers {"scores": [...]}"""
    verify: Literal["math", "gsm8k", "exact"] | None = None
    """1 for a response whose answer is that of the column answer_key, else 0"""
    format: str | None = None
    """1 for a response that this regular expression matches from end to end, else 0; a dot matches line breaks too"""
    penalty: Literal["repetition"] | None = None
    """repetition: minus the share of a response's n-grams of words that it has said before"""
    answer_key: str = "answer"
    """column of the right answers, for verify"""
    ngram: PositiveInt = 3
    """words of an n-gram, for penalty: repetition"""
    token_variable: str | None = None
    """environment variable that holds the endpoint's bearer token"""
    send_fields: list[str] = Field(default_factory=list)
    """columns that the endpoint is sent too, as {"fields": {"answer": [...]}}"""
    timeout_seconds: Annotated[float, Field(gt=0.0, le=604800.0)] = 300.0
    """a function or an endpoint that takes longer over one batch has failed; of verify and format, what is left then \
scores 0"""
    retries: NonNegativeInt = 3
    """further tries after an endpoint failed, with growing pauses between them"""

    @property
    def asks_a_model(self) -> bool:
        """Whether the scores are those of a model that is loaded from a folder."""
        return self.path is not None or self.classifier is not None


class WeightedTermConfig(RewardTermConfig):
    """One of several sources of scores, and its weight in the sum."""

    rules: ClassVar[tuple[Rule, ...]] = (*RewardTermConfig.rules, _term_has_one_source)

    weight: Finite = 1.0
    """its scores are multiplied by this; 0 for a term that is logged only"""


def one_reward_source(config: RewardSourceConfig) -> Problem | None:
    """Scores come from exactly one place, or from terms."""
    given = sources_of(config) | ({"terms": sorted(config.terms)} if config.terms else {})
    remedy = (
        "give exactly one of path (a reward model), classifier, function (Python), url (an HTTP endpoint), "
        "verify, format, penalty and terms (several of them)"
    )
    return _exactly_one(given, remedy)


def _some_weight_counts(config: RewardSourceConfig) -> Problem | None:
    if not config.terms or any(term.weight != 0 for term in config.terms.values()):
        return None
    remedy = "every weight is 0, so every score would be 0: give one term another weight"
    return Problem("terms", remedy, f"terms {', '.join(config.terms)}")


def _names_are_free(config: RewardSourceConfig) -> Problem | None:
    clashing = [name for name in config.terms if name in TAKEN]
    if not clashing:
        return None
    remedy = f"a term is logged as reward/<name>, and {', '.join(TAKEN)} are taken: rename"
    return Problem("terms", remedy, repr(clashing[0]))


def _cache_has_use(config: RewardSourceConfig) -> Problem | None:
    if config.cache is False or any(_worth_caching(term) for term in terms_of(config)):
        return None
    remedy = "holds scores of function, url, classifier and verify: math, and this reward has none of them"
    return Problem("cache", remedy, repr(config.cache))


def _worth_caching(term: RewardTermConfig) -> bool:
    costly = any(source is not None for source in (term.function, term.url, term.classifier))
    return costly or term.verify == "math" or not sources_of(term)


class RewardSourceConfig(RewardTermConfig):
    """Where the scores of reinforcement learning come from: one source, or several with weights."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *RewardTermConfig.rules,
        one_reward_source,
        _some_weight_counts,
        _names_are_free,
        _cache_has_use,
    )

    terms: dict[TermName, WeightedTermConfig] = Field(default_factory=dict)
    """several sources by name, each with a weight: the score is their weighted sum; each is logged as reward/<name>"""
    cache: bool | str = False
    """keep scores, so that the same prompt and response are judged once: true in memory, or the path of a file, which \
is to be deleted when what a function imports has changed"""


def longest_seconds(config: RewardSourceConfig) -> float:
    """How long one batch may take on one rank; 0 where only models are asked, which have no limit."""
    return sum(_longest(term) for term in terms_of(config))


def terms_of(config: RewardSourceConfig) -> list[RewardTermConfig]:
    """Its terms; itself, where it is one source alone."""
    return [*config.terms.values()] if config.terms else [config]


def _longest(term: RewardTermConfig) -> float:
    if term.url is not None:
        return (term.retries + 1) * term.timeout_seconds + term.retries * LONGEST_PAUSE
    limited = any(source is not None for source in (term.function, term.verify, term.format))
    return term.timeout_seconds if limited else 0.0
