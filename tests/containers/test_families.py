"""A container's logits are those of the training forward: for each family, each variant, in fp32 and bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hybrid.containers import FAMILIES, Decode, Decoder, Prefill, bind, reason_without_container
from lightning_hybrid.errors import RolloutError
from tests.containers.models import VARIANTS, variant

LENGTHS = [9, 1, 17, 50]  # a single token, and with what follows the model's maximum, among them
STEPS = 14


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 50, (length + STEPS,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def container_logits(decoder: Decoder) -> Tensor:
    """Logits ``[rows, steps + 1, vocabulary]`` behind each prompt and each token fed after it."""
    cache = decoder.cache(len(LENGTHS) + 1, max(LENGTHS) + STEPS)

    prompts = [text[:length] for text, length in zip(texts(), LENGTHS, strict=True)]
    prefill = Prefill(cache, decoder.scores, torch.arange(len(LENGTHS)), LENGTHS)
    hidden = decoder(torch.cat(prompts), prefill.positions, prefill)
    logits = [decoder.logits(hidden[prefill.last])]
    lengths = torch.tensor(LENGTHS)
    for step in range(STEPS):
        tokens = torch.stack([text[length + step] for text, length in zip(texts(), LENGTHS, strict=True)])
        attend = Decode(cache, decoder.scores, lengths, lengths.tolist())
        logits.append(decoder.logits(decoder(tokens, lengths, attend)))
        lengths = lengths + 1
    return torch.stack(logits, 1)


@torch.no_grad()
def training_logits(model: Any) -> Tensor:
    rows = [model(text[None]).logits[0, length - 1 :] for text, length in zip(texts(), LENGTHS, strict=True)]
    return torch.stack(rows).float()


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.abs().max() / to.abs().max())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_the_training_forward(name: str) -> None:
    model = variant(name)
    expected = training_logits(model)
    assert relative(container_logits(bind(model, 64)) - expected, expected) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_logits_are_as_close_as_two_attention_implementations_are_to_each_other(name: str) -> None:
    model = variant(name, torch.bfloat16)
    exact = training_logits(variant(name).double())
    expected = training_logits(model)
    spread = relative(training_logits(variant(name, torch.bfloat16, "eager")) - exact, exact)
    assert relative(container_logits(bind(model, 64)) - expected, expected) <= 2 * spread


def test_every_family_is_tried() -> None:
    assert {name.split(",")[0] for name in VARIANTS} == set(FAMILIES)


def test_windows_soft_caps_and_slopes_matter_in_these_models() -> None:
    """What the tests above would miss if the models were too tame."""
    for name, change in (
        ("mistral, window", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": 1e6}),
        ("gemma3_text", {"sliding_window": 64}),
    ):
        model, other = variant(name), variant(name)
        for key, value in change.items():
            setattr(other.config, key, value)
        decoder, without = bind(model, 64), bind(other, 64)
        assert relative(container_logits(decoder) - container_logits(without), container_logits(decoder)) > 1e-4, name


def test_a_family_without_a_container_is_refused_with_those_that_have_one() -> None:
    from tests.models.test_policy import family

    model = family("granite")
    assert reason_without_container(model, 8) is not None
    with pytest.raises(RolloutError, match=r"GraniteForCausalLM has no inference container: .*'granite'.* bloom, "):
        bind(model, 8)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual connection starts after the norm"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        (
            "llama, dynamic",
            {"max_position_embeddings": 32},
            "dynamic rotary frequencies change beyond 32 tokens, and 40 are asked",
        ),
    ],
)
def test_what_a_container_does_not_know_is_said(name: str, change: dict[str, Any], reason: str) -> None:
    model = variant(name)
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(RolloutError, match=reason):
        bind(model, 40)
