"""Tokens are drawn with the probabilities that are stated, from streams of their own, shaped as Hugging Face shapes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_hybrid.generation import SamplingParams
from lightning_hybrid.generation.draw import Drawn, Sampler, invert, stream_key, uniform
from tests.models.test_policy import family

CPU = torch.device("cpu")
EOS = [2, 7]
FILTERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 10},
    "top_k of more than there are": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "a small top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "a reward for repetition": {"repetition_penalty": 0.7},
    "min_new_tokens": {"min_new_tokens": 5},
    "all": {
        "repetition_penalty": 1.2,
        "min_new_tokens": 5,
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
    },
}


def logits_of(rows: int = 64, vocabulary: int = 50, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def keys_of(rows: int, seed: int = 0) -> Tensor:
    return torch.tensor([stream_key(seed, prompt, 0) for prompt in range(rows)])


def sampler(**options: Any) -> Sampler:
    return Sampler(SamplingParams(max_new_tokens=8, **options), EOS, CPU)


def drawn(logits: Tensor, seen: Tensor | None = None, **options: Any) -> Drawn:
    rows = len(logits)
    return sampler(**options)(logits, keys_of(rows), torch.zeros(rows).long(), seen)


# ---- random numbers -------------------------------------------------------------------------------------------------


def test_random_numbers_lie_between_0_and_1_and_are_spread_evenly() -> None:
    keys = keys_of(1000)
    numbers = torch.stack([uniform(keys, torch.full_like(keys, at)) for at in range(100)])
    assert numbers.dtype == torch.float64
    assert 0 < numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    # Along a stream and across streams.
    assert_frequencies((numbers.flatten() * 64).long(), torch.ones(64).double() / 64)
    for a, b in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        together = (a * 8).long() * 8 + (b * 8).long()
        assert_frequencies(together.flatten(), torch.ones(64).double() / 64)


def test_random_numbers_stay_inside_for_every_key() -> None:
    extremes = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    for at in range(1000):
        numbers = uniform(extremes, torch.full_like(extremes, at))
        assert ((numbers > 0) & (numbers < 1)).all()


def test_a_random_number_depends_on_its_key_and_place_alone() -> None:
    keys, at = keys_of(50), torch.arange(50)
    together = uniform(keys, at)
    for row in range(50):
        assert uniform(keys[row : row + 1], at[row : row + 1])[0] == together[row]


def test_streams_differ_by_seed_prompt_and_sample() -> None:
    names = list(itertools.product([*range(12), -1, 2**63, 2**64 - 2], range(40), range(12)))
    keys = {stream_key(*name) for name in names}
    assert len(keys) == len(names)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert stream_key(1, 2, 3) == stream_key(1, 2, 3)


# ---- drawing --------------------------------------------------------------------------------------------------------


def assert_frequencies(values: Tensor, probabilities: Tensor) -> None:
    """Pearson's test; cells with fewer than 5 expected count together."""
    expected = probabilities * len(values)
    counts = torch.bincount(values, minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected, counts = expected[expected > 0], counts[expected > 0]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom), (
        f"chi-square {statistic:.1f}, {freedom} degrees of freedom"
    )


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 50, 2048])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_tokens_come_as_often_as_is_probable(vocabulary: int, scale: float) -> None:
    logits = logits_of(1, vocabulary, scale)
    logits[:, 1::3] = -torch.inf
    weights = (logits - logits.max()).exp()
    keys = keys_of(20_000)
    tokens = invert(weights.expand(len(keys), -1), uniform(keys, torch.zeros_like(keys)))
    assert_frequencies(tokens, logits[0].double().softmax(-1))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 5, "top_p": 0.9}])
def test_a_sampler_draws_with_the_probabilities_that_it_states(options: dict[str, Any]) -> None:
    logits = logits_of(1, scale=1.0).expand(20_000, -1)
    got = drawn(logits, **options)
    probability = sampler(**options).shape(logits[:1], torch.zeros(1).long(), None).double().softmax(-1)[0]
    assert_frequencies(got.tokens, probability)
    torch.testing.assert_close(got.sampling_logprobs.exp(), probability.float()[got.tokens])


def test_the_drawn_token_is_where_the_cumulative_distribution_passes_the_random_number() -> None:
    for vocabulary in (33, 50, 2048, 5000):
        weights = logits_of(200, vocabulary).exp()
        at = uniform(keys_of(200), torch.zeros(200).long())
        cumulative = weights.double().cumsum(-1)
        expected = torch.searchsorted(cumulative, (at * cumulative[:, -1])[:, None]).squeeze(1)
        assert (invert(weights, at) == expected).all()


@pytest.mark.parametrize("vocabulary", [1, 5, 33, 64, 1000])
def test_a_token_of_weight_0_is_never_drawn(vocabulary: int) -> None:
    ends = torch.tensor([2.0**-49, 0.25, 0.5, 0.75, 1 - 2.0**-49], dtype=torch.float64)
    for place in {0, vocabulary // 2, vocabulary - 1}:
        for weight in (1.0, 1e-30):
            weights = torch.zeros(len(ends), vocabulary)
            weights[:, place] = weight
            assert (invert(weights, ends) == place).all()
    # Some hold something, and the random number falls where one ends and the next begins.
    weights = torch.zeros(1, vocabulary)
    weights[:, ::2] = 1.0
    at = torch.arange(1, 64).double() / 64
    tokens = invert(weights.expand(len(at), -1), at)
    assert (tokens % 2 == 0).all()


@pytest.mark.parametrize("name", FILTERS)
def test_a_draw_depends_on_its_own_row_alone(name: str) -> None:
    logits = logits_of()
    keys, produced = keys_of(64), torch.arange(64) % 9
    seen = torch.rand(64, 50, generator=torch.Generator().manual_seed(2)) < 0.2
    draw = sampler(**FILTERS[name])
    together = draw(logits, keys, produced, seen)
    for row in range(0, 64, 7):
        part = slice(row, row + 1)
        assert draw(logits[part], keys[part], produced[part], seen[part]).tokens == together.tokens[row]


def test_temperature_0_takes_the_most_probable_token() -> None:
    logits = logits_of()
    assert (drawn(logits, temperature=0.0).tokens == logits.argmax(-1)).all()
    early = drawn(logits, temperature=0.0, min_new_tokens=1).tokens
    assert (early == logits.index_fill(1, torch.tensor(EOS), -torch.inf).argmax(-1)).all()


# ---- what is stated about a draw ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_logprobs_and_entropy_are_those_of_float64(name: str, scale: float) -> None:
    logits = logits_of(scale=scale)
    seen = torch.rand(64, 50, generator=torch.Generator().manual_seed(2)) < 0.2
    got = drawn(logits, seen, entropy=True, **FILTERS[name])
    exact = logits.double().log_softmax(-1)
    assert got.entropies is not None
    close = {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(got.policy_logprobs, at(exact, got.tokens), **close)
    torch.testing.assert_close(got.entropies, -(exact.exp() * exact).sum(-1), **close)
    shaped = sampler(**FILTERS[name]).shape(logits, torch.zeros(64).long(), seen)
    torch.testing.assert_close(got.sampling_logprobs, at(shaped.double().log_softmax(-1), got.tokens), **close)
    assert got.finite.all()


def at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None]).squeeze(1)


def test_with_temperature_0_sampling_logprobs_are_those_of_the_shaped_logits() -> None:
    logits = logits_of()
    got = drawn(logits, temperature=0.0)
    assert (got.sampling_logprobs == got.policy_logprobs).all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_are_flagged_in_their_row(number: float) -> None:
    logits = logits_of(5)
    logits[1, 3] = number
    logits[3] = -torch.inf
    for options in ({}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1}):
        assert drawn(logits, **options).finite.tolist() == [True, False, True, False, True]


def test_logits_of_minus_infinity_are_numbers() -> None:
    logits = logits_of(64)
    logits[:, ::2] = -torch.inf
    got = drawn(logits, entropy=True)
    exact = logits[:, 1::2].double().log_softmax(-1)
    assert got.finite.all()
    assert (got.tokens % 2 == 1).all()
    torch.testing.assert_close(got.entropies, -(exact.exp() * exact).sum(-1), check_dtype=False, rtol=1e-5, atol=1e-6)


# ---- against Hugging Face -------------------------------------------------------------------------------------------


def hugging_face(options: dict[str, Any]) -> LogitsProcessorList:
    """Its processors in its order, for a prompt of 6 tokens."""
    makers = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "min_new_tokens": lambda least: MinNewTokensLengthLogitsProcessor(6, least, EOS),
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList([make(options[name]) for name, make in makers.items() if name in options])


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocabulary", [50, 2048])
@pytest.mark.parametrize("produced", [0, 4, 5])
def test_filters_keep_what_those_of_hugging_face_keep(name: str, vocabulary: int, produced: int) -> None:
    logits = logits_of(100, vocabulary)
    tokens = torch.randint(vocabulary, (100, 6 + produced), generator=torch.Generator().manual_seed(3))
    seen = torch.zeros_like(logits).bool().scatter(1, tokens, True)
    expected = hugging_face(FILTERS[name])(tokens, logits.clone())
    shaped = sampler(**FILTERS[name]).shape(logits, torch.full((100,), produced), seen)
    assert (shaped.isfinite() == expected.isfinite()).all()
    torch.testing.assert_close(shaped, expected)


def test_filters_come_in_the_order_of_the_models_own_generate() -> None:
    model = family("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    prompts = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    options = FILTERS["all"]
    torch.manual_seed(0)
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        max_new_tokens=8,
        eos_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **options,
    )
    for step, (logits, expected) in enumerate(zip(output.logits, output.scores, strict=True)):
        seen = torch.zeros_like(logits).bool().scatter(1, output.sequences[:, : 6 + step], True)
        shaped = sampler(**options).shape(logits, torch.full((8,), step), seen)
        torch.testing.assert_close(shaped, expected)
