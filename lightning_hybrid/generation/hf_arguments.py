"""What Hugging Face's ``generate`` takes, in the decode loop's terms, and responses in the shape that it returns.

Every option either means here what it means there, or has no effect in either, or is refused by name.
"""

from __future__ import annotations

import copy
import inspect
import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation.carrier import Rollout
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.models import base_of

# What `generate` does where neither the call nor the model's generation configuration says.
DEFAULT_NEW_TOKENS, DEFAULT_TOP_K = 20, 50

HONOURED = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_return_sequences"),
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "stop_strings", "eos_token_id", "pad_token_id"),
    *("inputs", "input_ids", "attention_mask", "tokenizer"),
}
# Without effect on the tokens where there is one beam, no assistant, no encoder and a key-value cache of our own; an
# engine keeps its ranks in step whether `synced_gpus` asks for it or not.
WITHOUT_EFFECT = {
    *("early_stopping", "length_penalty", "diversity_penalty", "renormalize_logits"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("bos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("synced_gpus", "trust_remote_code", "transformers_version"),
}
WITHOUT_EFFECT_ON_GREEDY = {"top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Values at which a refused option changes nothing; None, False and what is empty never do.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "cache_implementation": ("dynamic", "hybrid"),
}
REMEDY = "leave that out, or let the model's own generate run (engine.generate_with_model, or rollout.backend=hf)"


@dataclass(frozen=True)
class HFRequest:
    """A call of ``generate``, in the decode loop's terms.

    Attributes:
        input_ids: ``[batch, width]`` integers, the prompts as they were given, padding and all.
        prompts: the same without padding.
        sampling: how to draw.
        pad_id: fills responses that end early.
        tokenizer: decodes where ``sampling.stop`` has texts; None where none was given.
    """

    input_ids: Tensor
    prompts: list[list[int]]
    sampling: SamplingParams
    pad_id: int
    tokenizer: Any = None


def read_arguments(model: Any, input_ids: Tensor | None, kwargs: Mapping[str, Any]) -> HFRequest:
    """Translate the arguments of a call of ``generate``.

    As there, a keyword goes before ``generation_config``, and that before the model's generation configuration. Stop
    strings are looked for in the response alone: one that begins in the prompt does not end it.

    Args:
        model: the causal LM, or peft's model around it.
        input_ids: ``[batch, width]`` integers, prompts padded on the left; None where ``kwargs`` has them, as
            ``input_ids`` or ``inputs``.
        kwargs: the other arguments. Without ``attention_mask`` (``[batch, width]``, 1 on tokens and 0 on padding), a
            pad token that is not also an end token counts as padding.

    Raises:
        RolloutError: naming every option that the decode loop does not honour and every keyword that is not known;
            or for options that contradict each other, or prompts that are not padded on the left.
        ConfigError: naming every number that cannot be.
    """
    options, rest = _merged(model, kwargs)
    _refuse_unsupported(model, options, rest, kwargs)
    input_ids = _one_input(input_ids, rest)
    end_ids = _token_ids(options.eos_token_id)
    pad_ids = [*_token_ids(options.pad_token_id), *end_ids]
    mask = _attention_mask(rest.get("attention_mask"), input_ids, _token_ids(options.pad_token_id), end_ids)
    return HFRequest(
        input_ids=input_ids,
        prompts=_without_padding(input_ids, mask),
        sampling=_sampling(options, input_ids.shape[1], end_ids, base_of(model).config),
        # Without either, every response has the same length, unless a stop text ends one.
        pad_id=pad_ids[0] if pad_ids else 0,
        tokenizer=rest.get("tokenizer"),
    )


def as_sequences(request: HFRequest, rollout: Rollout) -> Tensor:
    """What ``generate`` returns: each prompt as it was given, then its response.

    Args:
        request: as read from the call.
        rollout: the responses to ``request.prompts``, ``request.sampling.n`` each.

    Returns:
        ``[batch * n, width + new]`` long, on the device of ``request.input_ids``; responses shorter than the longest
        end in ``request.pad_id``.
    """
    given = request.input_ids.repeat_interleave(request.sampling.n, 0)
    begin = int(rollout.response_mask[0].long().argmax())
    responses = slice(begin, begin + int(rollout.lengths.max()))
    new = rollout.tokens[:, responses].masked_fill(~rollout.response_mask[:, responses], request.pad_id)
    return torch.cat([given.long(), new.to(given.device)], 1)


def _merged(model: Any, kwargs: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """All generation options of a call, and its other arguments."""
    rest = dict(kwargs)
    asked = rest.pop("generation_config", None)
    if asked is not None and not isinstance(asked, GenerationConfig):
        raise RolloutError(f"generation_config is a {type(asked).__name__}: give a transformers.GenerationConfig")
    options = copy.deepcopy(asked or GenerationConfig())
    try:
        options.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        # Before the keywords: None among those means no limit.
        if options.top_k is None:
            options.top_k = DEFAULT_TOP_K
        rest = options.update(**rest)
    except ValueError as error:
        raise RolloutError(f"contradictory generation options: {error}") from error
    return options, rest


# ---- refusing ------------------------------------------------------------------------------------------------------


def _refuse_unsupported(
    model: Any, options: GenerationConfig, rest: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> None:
    known = {*inspect.signature(GenerationMixin.generate).parameters, "assistant_tokenizer"}
    known |= {*inspect.signature(base_of(model).forward).parameters}
    changing = {name: value for name, value in rest.items() if not _changes_nothing(name, value)}
    refused = [
        *(f"{name}={_shown(value)}{_origin(name, kwargs)}" for name, value in _unsupported(options)),
        *(f"{name}={_shown(value)}" for name, value in changing.items() if name in known),
    ]
    unknown = [f"{name}={_shown(value)}" for name, value in changing.items() if name not in known]
    problems = []
    if refused:
        problems.append(f"it does not honour {', '.join(refused)}: {REMEDY}")
    if unknown:
        problems.append(f"neither it nor the model knows {', '.join(unknown)}: correct the name")
    if problems:
        raise RolloutError("generation with the trained weights: " + "; ".join(problems))


def _unsupported(options: GenerationConfig) -> Iterator[tuple[str, Any]]:
    """Options that would change the tokens and that the loop does not have."""
    # What else a model's file holds is not an option: `generate` does not look at it either.
    for name in vars(GenerationConfig()):
        value = getattr(options, name, None)
        idle = name in WITHOUT_EFFECT_ON_GREEDY and not options.do_sample
        if not (name.startswith("_") or idle or _changes_nothing(name, value)):
            yield name, value


def _changes_nothing(name: str, value: Any) -> bool:
    if name in HONOURED or name in WITHOUT_EFFECT or value is None or value is False:
        return True
    if isinstance(value, Collection) and not isinstance(value, str | Tensor):
        return len(value) == 0
    return isinstance(value, int | float | str) and value in NEUTRAL.get(name, ())


def _origin(name: str, kwargs: Mapping[str, Any]) -> str:
    asked = name in kwargs or getattr(kwargs.get("generation_config"), name, None) is not None
    return "" if asked else " (from model.generation_config)"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor of shape {list(value.shape)}"
    plain = isinstance(value, bool | int | float | str | list | tuple | dict)
    return reprlib.repr(value) if plain else getattr(value, "__name__", type(value).__name__)


# ---- prompts -------------------------------------------------------------------------------------------------------


def _one_input(input_ids: Tensor | None, rest: Mapping[str, Any]) -> Tensor:
    given = [ids for ids in (input_ids, rest.get("input_ids"), rest.get("inputs")) if ids is not None]
    if len(given) != 1:
        raise RolloutError(f"the prompts are given {len(given)} times: give input_ids (or inputs) once")
    ids: Tensor = given[0]
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise RolloutError(f"input_ids are {ids.dtype} of shape {list(ids.shape)}: give token ids, [batch, width]")
    return ids


def _attention_mask(given: Tensor | None, input_ids: Tensor, pad_ids: list[int], end_ids: list[int]) -> Tensor:
    """``[batch, width]`` bool, True on tokens."""
    if given is None:
        # A pad token that also ends responses may stand in a prompt: it tells nothing.
        tells = [pad for pad in pad_ids if pad not in end_ids]
        return input_ids != tells[0] if tells else torch.ones_like(input_ids, dtype=torch.bool)
    if given.shape != input_ids.shape:
        raise RolloutError(
            f"attention_mask has shape {list(given.shape)}, and input_ids {list(input_ids.shape)}: they must be equal"
        )
    if not bool(((given == 0) | (given == 1)).all()):
        raise RolloutError("attention_mask has values other than 0 (padding) and 1 (token)")
    return given.bool()


def _without_padding(input_ids: Tensor, mask: Tensor) -> list[list[int]]:
    prompts = []
    for row, (tokens, kept) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
        if True not in kept:
            raise RolloutError(f"row {row} has no tokens, only padding: give it at least one (a BOS will do)")
        begin = kept.index(True)
        if not all(kept[begin:]):
            hole = begin + kept[begin:].index(False)
            raise RolloutError(
                f"row {row} has padding after its first token, in column {hole}: pad prompts on the left "
                "(tokenizer.padding_side='left')"
            )
        prompts.append(tokens[begin:])
    return prompts


# ---- sampling ------------------------------------------------------------------------------------------------------


def _sampling(options: GenerationConfig, width: int, end_ids: list[int], config: Any) -> SamplingParams:
    temperature = _or(options.temperature, 1.0)
    if options.do_sample and temperature == 0:
        raise RolloutError("temperature is 0 with do_sample=True: for the most probable token give do_sample=False")
    stop = _or(options.stop_strings, ())
    least = _or(options.min_new_tokens, max(0, _or(options.min_length, 0) - width))
    if stop and least:
        raise RolloutError(
            f"stop_strings={stop!r} with min_new_tokens={least}: the decode loop looks for texts only after that many "
            "tokens; give one of the two"
        )
    sampled = {
        "temperature": temperature,
        "top_k": _or(options.top_k, 0),
        "top_p": _or(options.top_p, 1.0),
        "min_p": _or(options.min_p, 0.0),
    }
    return SamplingParams(
        max_new_tokens=_max_new_tokens(options, width, config),
        **(sampled if options.do_sample else {"temperature": 0.0}),
        n=_or(options.num_return_sequences, 1),
        stop=stop,
        repetition_penalty=_or(options.repetition_penalty, 1.0),
        min_new_tokens=least,
        # A negative id never comes: some configurations have -1 for none.
        eos_ids=tuple(token for token in end_ids if token >= 0),
    )


def _max_new_tokens(options: GenerationConfig, width: int, config: Any) -> int:
    if options.max_new_tokens is not None:
        return int(options.max_new_tokens)
    longest = options.max_length
    if longest is None:
        warnings.warn(
            f"neither max_new_tokens nor max_length is given: responses end after {DEFAULT_NEW_TOKENS} tokens",
            stacklevel=2,
        )
        default = width + DEFAULT_NEW_TOKENS
        longest = min(default, _or(getattr(config, "max_position_embeddings", None), default))
    if longest <= width:
        raise RolloutError(
            f"max_length is {longest}, and the prompts are {width} wide already, padding included: raise it, or give "
            "max_new_tokens"
        )
    return int(longest) - width


def _token_ids(ids: Any) -> list[int]:
    """One id, several, in a tensor or not, or none."""
    return [] if ids is None else [int(token) for token in torch.as_tensor(ids).flatten().tolist()]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
