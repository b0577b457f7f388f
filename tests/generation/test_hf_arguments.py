"""A call of ``generate`` means what it means to Hugging Face, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    WatermarkingConfig,
)

from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.generation import Rollout, generate
from lightning_hybrid.generation.hf_arguments import (
    HONOURED,
    WITHOUT_EFFECT,
    HFRequest,
    as_sequences,
    read_arguments,
)
from tests.helpers import tiny_policy
from tests.models.test_policy import family


def lively(model: Any) -> Any:
    """The model with larger weights: its most probable tokens then differ from step to step."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


def padded(rows: int = 4, width: int = 6, vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    """Prompts of 3, 5 and then ``width`` tokens, padded on the left with 0."""
    tokens = torch.randint(3, vocabulary, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, : width - 3] = 0
    mask[1, : width - 5] = 0
    return tokens * mask, mask


def ours(model: Any, input_ids: Tensor | None, seed: int = 0, **kwargs: Any) -> Tensor:
    request = read_arguments(model, input_ids, kwargs)
    rollout = generate(model, request.prompts, request.sampling, seed, tokenizer=request.tokenizer)
    return as_sequences(request, rollout)


def read(model: Any = None, **kwargs: Any) -> HFRequest:
    tokens, mask = padded()
    return read_arguments(model or family("llama"), tokens, {"attention_mask": mask, "max_new_tokens": 8} | kwargs)


# ---- the same as Hugging Face ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "opt", "gpt_neox", "bloom"])
def test_the_most_probable_tokens_are_those_of_the_models_own_generate(name: str) -> None:
    model = lively(family(name))
    tokens, mask = padded()
    call = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": [2, 31, 28]}
    expected = model.generate(tokens, **call)
    torch.testing.assert_close(ours(model, tokens, **call), expected, rtol=0, atol=0)


SAME_AS_GENERATE: dict[str, dict[str, Any]] = {
    "rows that end early are padded": {"max_new_tokens": 12, "eos_token_id": 31, "pad_token_id": 7},
    "without a pad token the end token fills": {"max_new_tokens": 12, "eos_token_id": [31, 28], "pad_token_id": None},
    "no end token": {"max_new_tokens": 12, "eos_token_id": None},
    "an end token that never comes": {"max_new_tokens": 12, "eos_token_id": -1, "min_new_tokens": 4},
    "max_length counts the padding": {"max_length": 14},
    "max_new_tokens goes before max_length": {"max_new_tokens": 3, "max_length": 30},
    "min_new_tokens": {"max_new_tokens": 12, "min_new_tokens": 5, "eos_token_id": [31, 28]},
    "min_length counts the padding": {"max_new_tokens": 12, "min_length": 11, "eos_token_id": [31, 28]},
    "min_length shorter than the prompts": {"max_new_tokens": 12, "min_length": 4, "eos_token_id": [31, 28]},
    "repetition_penalty": {"max_new_tokens": 12, "repetition_penalty": 1.7},
    "options of sampling without sampling": {"max_new_tokens": 6, "do_sample": False, "top_p": 0.5, "typical_p": 0.5},
    "a generation configuration": {"generation_config": GenerationConfig(max_new_tokens=9, eos_token_id=31)},
    "a keyword before the configuration": {
        "generation_config": GenerationConfig(max_new_tokens=9),
        "max_new_tokens": 4,
    },
}


@pytest.mark.parametrize("case", SAME_AS_GENERATE)
def test_options_mean_what_they_mean_to_the_models_own_generate(case: str) -> None:
    model = lively(family("llama"))
    tokens, mask = padded()
    call = SAME_AS_GENERATE[case] | {"attention_mask": mask}
    expected = model.generate(tokens, **call)
    torch.testing.assert_close(ours(model, tokens, **call), expected, rtol=0, atol=0)


def test_the_models_generation_configuration_is_the_base() -> None:
    model = lively(family("llama"))
    model.generation_config.update(max_new_tokens=11, eos_token_id=[31, 28], pad_token_id=9, repetition_penalty=1.2)
    tokens, mask = padded()
    for call in ({}, {"max_new_tokens": 4}, {"generation_config": GenerationConfig(eos_token_id=28)}):
        expected = model.generate(tokens, attention_mask=mask, **call)
        torch.testing.assert_close(ours(model, tokens, attention_mask=mask, **call), expected, rtol=0, atol=0)


def test_without_a_length_twenty_tokens_are_generated_with_a_warning() -> None:
    model = lively(family("llama"))
    tokens, mask = padded()
    expected = model.generate(tokens, attention_mask=mask)
    with pytest.warns(UserWarning, match="neither max_new_tokens nor max_length is given: responses end after 20"):
        got = ours(model, tokens, attention_mask=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    model.config.max_position_embeddings = 16
    with pytest.warns(UserWarning, match="responses end after 20"):
        assert read_arguments(model, tokens, {}).sampling.max_new_tokens == 10


@pytest.mark.parametrize(
    ("pad", "end"), [(0, 2), (0, None), (None, 2), (None, None), (2, 2)], ids=lambda token: f"token {token}"
)
def test_without_a_mask_padding_is_told_as_the_models_own_generate_tells_it(pad: int | None, end: int | None) -> None:
    model = lively(family("llama"))
    tokens, _ = padded()
    model.generation_config.update(pad_token_id=pad, eos_token_id=end)
    expected = model.generate(tokens, max_new_tokens=8)
    torch.testing.assert_close(ours(model, tokens, max_new_tokens=8), expected, rtol=0, atol=0)


def letter_tokenizer() -> Any:
    """Letters and a few merges. (Hugging Face cannot look for stop strings with a vocabulary of whole words.)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [chr(letter) for letter in range(33, 127)]
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog sat on the log, then they ran"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("begin", range(1, 6))
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("cut", [0, 1], ids=["whole tokens", "parts of tokens"])
def test_stop_strings_end_responses_where_the_models_own_generate_ends_them(begin: int, size: int, cut: int) -> None:
    tokenizer = letter_tokenizer()
    model = lively(tiny_policy(vocab_size=len(tokenizer)).model)
    model.generation_config.update(eos_token_id=2, pad_token_id=0)
    tokens, mask = padded(vocabulary=len(tokenizer))
    free = model.generate(tokens, attention_mask=mask, max_new_tokens=10)[1, tokens.shape[1] :]
    text = tokenizer.decode(free[begin : begin + size])
    stop = [text[cut : len(text) - cut] or text, "never"]
    call = {"attention_mask": mask, "max_new_tokens": 10, "stop_strings": stop, "tokenizer": tokenizer}
    expected = model.generate(tokens, **call)
    assert (expected[1, tokens.shape[1] + begin + size :] == 0).all(), "the text ended the response"
    torch.testing.assert_close(ours(model, tokens, **call), expected, rtol=0, atol=0)


def test_stop_strings_work_with_a_vocabulary_of_words() -> None:
    tokenizer = build_tokenizer()
    model = lively(tiny_policy().model)
    tokens, mask = padded(vocabulary=len(tokenizer))
    free = ours(model, tokens, attention_mask=mask, max_new_tokens=10, eos_token_id=None)[0, tokens.shape[1] :]
    stop = tokenizer.decode(free[3:5])
    call = {"max_new_tokens": 10, "stop_strings": stop, "tokenizer": tokenizer, "eos_token_id": None}
    got = ours(model, tokens[:1], attention_mask=mask[:1], **call)
    assert got[0, tokens.shape[1] :].tolist() == free[:5].tolist()
    with pytest.raises(ConfigError, match="needs a tokenizer to tell texts in tokens: give tokenizer="):
        ours(model, tokens, attention_mask=mask, **call | {"tokenizer": None})


def test_several_responses_to_a_prompt_stand_together_below_each_other() -> None:
    model = lively(family("llama"))
    tokens, mask = padded()
    call = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
    got = ours(model, tokens, **call, eos_token_id=None)
    assert got.shape == model.generate(tokens, **call, eos_token_id=None).shape == (12, 11)
    assert got.dtype == torch.long
    assert (got[:, :6] == tokens.repeat_interleave(3, 0)).all()
    assert not (got[0] == got[1]).all()
    # Among one token there is nothing to draw.
    best = model.generate(tokens, attention_mask=mask, max_new_tokens=5, eos_token_id=None)
    assert (ours(model, tokens, **call, eos_token_id=None, top_k=1) == best.repeat_interleave(3, 0)).all()


WITHOUT_EFFECT_VALUES: dict[str, Any] = {
    "early_stopping": True,
    "length_penalty": 0.5,
    "diversity_penalty": 0.5,
    "renormalize_logits": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "max_matching_ngram_size": 3,
    "bos_token_id": 5,
    "decoder_start_token_id": 5,
    "use_cache": False,
    "max_cache_len": 64,
    "disable_compile": True,
    "synced_gpus": False,
    "trust_remote_code": True,
    "cache_implementation": "dynamic",
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "logits_processor": LogitsProcessorList(),
    "token_healing": False,
}


@pytest.mark.parametrize("option", WITHOUT_EFFECT_VALUES)
def test_an_option_that_is_ignored_has_no_effect_on_the_models_own_generate_either(option: str) -> None:
    model = lively(family("llama"))
    tokens, mask = padded()
    call = {"attention_mask": mask, "max_new_tokens": 8, option: WITHOUT_EFFECT_VALUES[option]}
    torch.testing.assert_close(ours(model, tokens, **call), model.generate(tokens, **call), rtol=0, atol=0)


def test_a_lora_model_generates_as_by_itself() -> None:
    from peft import LoraConfig, get_peft_model

    model = lively(family("llama"))
    model.generation_config.update(max_new_tokens=7, eos_token_id=31)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    tokens, mask = padded()
    expected = model.generate(input_ids=tokens, attention_mask=mask)
    torch.testing.assert_close(ours(model, tokens, attention_mask=mask), expected, rtol=0, atol=0)


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_sampling_options_become_sampling_parameters() -> None:
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    request = read(do_sample=True, num_return_sequences=2, min_new_tokens=3, eos_token_id=[2, 4], **options)
    for name, value in options.items():
        assert getattr(request.sampling, name) == value
    assert (request.sampling.n, request.sampling.min_new_tokens, request.sampling.eos_ids) == (2, 3, (2, 4))
    assert [len(prompt) for prompt in request.prompts] == [3, 5, 6, 6]


def test_sampling_defaults_are_those_of_hugging_face() -> None:
    assert read().sampling.greedy
    sampling = read(do_sample=True).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, 50, 1.0, 0.0)
    assert read(do_sample=True, top_k=None).sampling.top_k == 0
    assert read(do_sample=True, top_k=0).sampling.top_k == 0
    assert read(generation_config=GenerationConfig(do_sample=True, top_k=7)).sampling.top_k == 7


def test_neither_the_call_nor_the_model_is_changed() -> None:
    model = family("llama")
    config = GenerationConfig(do_sample=True)
    kwargs = {"generation_config": config, "max_new_tokens": 4, "temperature": 0.5}
    before = model.generation_config.to_dict(), config.to_dict()
    read_arguments(model, padded()[0], kwargs)
    assert (model.generation_config.to_dict(), config.to_dict()) == before
    assert set(kwargs) == {"generation_config", "max_new_tokens", "temperature"}


@pytest.mark.parametrize("name", ["input_ids", "inputs"])
def test_prompts_may_be_a_keyword(name: str) -> None:
    tokens, mask = padded()
    kwargs = {name: tokens, "attention_mask": mask.bool(), "max_new_tokens": 4}
    assert read_arguments(family("llama"), None, kwargs).prompts == read().prompts


def test_responses_are_joined_to_the_prompts_as_they_were_given() -> None:
    tokens = torch.tensor([[9, 9, 5], [9, 6, 7]])
    request = HFRequest(tokens.int(), [[5], [6, 7]], read().sampling, pad_id=9)
    rows = torch.tensor([[0, 5, 3, 0, 0], [6, 7, 3, 4, 0]])
    prompt = torch.tensor([[0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    response = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]).bool()
    zeros = torch.zeros(2, 5)
    sequences = as_sequences(request, Rollout(rows, prompt, response, zeros, zeros, ("eos", "length")))
    assert sequences.tolist() == [[9, 9, 5, 3, 9], [9, 6, 7, 3, 4]]


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED: dict[str, Any] = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
    "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1.0)]),
    "prefix_allowed_tokens_fn": len,
    "assistant_model": torch.nn.Identity(),
    "assistant_tokenizer": object(),
    "streamer": object(),
    "negative_prompt_ids": torch.ones(4, 2),
    "inputs_embeds": torch.ones(4, 2, 8),
    "position_ids": torch.ones(4, 6),
    "past_key_values": object(),
    "custom_generate": "somewhere/else",
    "cache_implementation": "quantized",
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "suppress_tokens": [3],
    "begin_suppress_tokens": [3],
    "bad_words_ids": [[3]],
    "sequence_bias": {(3,): 1.0},
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": (3, 1.1),
    "guidance_scale": 2.0,
    "watermarking_config": WatermarkingConfig(),
    "token_healing": True,
    "remove_invalid_values": True,
    "typical_p": 0.9,
    "epsilon_cutoff": 1e-3,
    "eta_cutoff": 1e-3,
    "top_h": 0.4,
    "max_time": 1.0,
    "low_memory": True,
    "prefill_chunk_size": 4,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "is_assistant": True,
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_would_change_the_result_is_refused_by_name(option: str) -> None:
    with pytest.raises(RolloutError, match=rf"does not honour .*{option}=.*: leave that out, or let the model's own"):
        read(do_sample=True, **{option: REFUSED[option]})


def test_every_option_of_the_installed_transformers_is_honoured_or_without_effect_or_refused() -> None:
    open_ = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - HONOURED - WITHOUT_EFFECT
    for name in open_ - REFUSED.keys():
        with pytest.raises(RolloutError, match=f"{name}=.new thing."):
            read(do_sample=True, **{name: "new thing"})


def test_all_refusals_come_in_one_message_that_says_where_from() -> None:
    model = family("llama")
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(RolloutError) as caught:
        read(model, num_beams=2, streamer=print, inputs_embeds=torch.ones(4, 2, 8), temprature=0.7)
    assert str(caught.value) == (
        "generation with the trained weights: it does not honour num_beams=2, no_repeat_ngram_size=3 (from "
        "model.generation_config), streamer=print, inputs_embeds=tensor of shape [4, 2, 8]: leave that out, or let the "
        "model's own generate run (engine.generate_with_model, or rollout.backend=hf); neither it nor the model knows "
        "temprature=0.7: correct the name"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 6, "max_new_tokens": None}, "max_length is 6, and the prompts are 6 wide already"),
        ({"max_new_tokens": 0}, "contradictory generation options: .*max_new_tokens"),
        ({"num_return_sequences": 2}, "contradictory generation options: .*num_return_sequences"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0 with do_sample=True"),
        ({"stop_strings": "x", "min_new_tokens": 3}, "stop_strings='x' with min_new_tokens=3"),
        ({"generation_config": {"do_sample": True}}, "generation_config is a dict: give a transformers.Generation"),
        ({"inputs": torch.ones(4, 6).long()}, "the prompts are given 2 times"),
        ({"attention_mask": torch.ones(4, 5)}, r"attention_mask has shape \[4, 5\], and input_ids \[4, 6\]"),
        ({"attention_mask": torch.full((4, 6), 2)}, "attention_mask has values other than 0 .padding. and 1"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        read(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new_tokens": 9}, r"min_new_tokens is 9: must be between 0 and max_new_tokens \(8\)"),
        ({"min_length": 20}, r"min_new_tokens is 14: must be between 0 and max_new_tokens \(8\)"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5: must be above 0 and at most 1"),
        ({"do_sample": True, "min_p": -0.5, "temperature": -1.0}, "temperature is -1.0: .*; min_p is -0.5"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**options)


def test_padding_anywhere_but_on_the_left_is_refused_naming_the_row() -> None:
    mask = torch.ones(4, 6).long()
    mask[2, 4:] = 0
    with pytest.raises(
        RolloutError, match="row 2 has padding after its first token, in column 4: pad prompts on the l"
    ):
        read(attention_mask=mask)
    mask = torch.ones(4, 6).long()
    mask[3] = 0
    with pytest.raises(RolloutError, match="row 3 has no tokens, only padding: give it at least one"):
        read(attention_mask=mask)
    with pytest.raises(RolloutError, match="row 0 has no tokens"):
        read_arguments(family("llama"), torch.zeros(2, 0).long(), {"max_new_tokens": 4})


@pytest.mark.parametrize("ids", [torch.ones(4).long(), torch.ones(2, 4)], ids=["one axis", "float"])
def test_what_is_not_a_batch_of_token_ids_is_refused(ids: Tensor) -> None:
    with pytest.raises(RolloutError, match=r"input_ids are torch.* of shape .*: give token ids, \[batch, width\]"):
        read_arguments(family("llama"), ids, {"max_new_tokens": 4})
