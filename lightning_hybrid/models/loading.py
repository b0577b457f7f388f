"""From a path, a hub name or an architecture to a model and its tokenizer, with errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.modules.dropout import _DropoutNd

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.adapter_folder import adapter_config, apply_adapter, base_of_adapter, is_adapter_folder
from lightning_hybrid.models.policy import Policy
from lightning_hybrid.models.scalar import ScalarModel, scalar_from_policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_policy(
    path: str | Path, chunk: int = 1024, quantize: Literal["nf4"] | None = None, base: str | None = None
) -> Policy:
    """Load a causal LM from a folder or a hub name, in float32 (engines cast it), as a :class:`Policy`.

    Args:
        path: of a model; or a folder that holds an adapter only, which is merged into its base.
        chunk: tokens per head call.
        quantize: hold the linear layers' weights in four bits.
        base: where an adapter's base lies, if not where the adapter says.

    Raises:
        ConfigError: if it cannot be loaded, is no language model, the adapter is not of this base, or bitsandbytes is
            missing.
    """
    from transformers import AutoModelForCausalLM

    if is_adapter_folder(path):
        return Policy(_merged_causal_lm(path, quantize, base), chunk)
    arguments = {} if quantize is None else {"quantization_config": _four_bits()}
    model, info = _from_pretrained(AutoModelForCausalLM, path, output_loading_info=True, **arguments)
    _refuse_without_head(model, info["missing_keys"], path)
    return Policy(model, chunk)


def _refuse_without_head(model: Any, missing: Iterable[str], path: str | Path) -> None:
    """Transformers makes up a head that a folder has not."""
    heads = {f"{name}.weight" for name, module in model.named_modules() if module is model.get_output_embeddings()}
    lacking = heads.intersection(missing)
    if lacking:
        raise ConfigError(
            f"'{path}' holds no language model: it has no {min(lacking)!r} (is it a reward model, or a trunk alone?); "
            "give the folder of a causal LM"
        )


def _merged_causal_lm(path: str | Path, quantize: str | None, base: str | None) -> Any:
    if quantize is not None:
        raise ConfigError(
            f"model.adapter.quantize={quantize}: '{path}' holds an adapter only, which has no place in quantized "
            f"weights; merge it first: lightning-hybrid export model.path={path} output_dir=..."
        )
    if adapter_config(path).task_type == "SEQ_CLS":
        raise ConfigError(f"'{path}' holds the adapter of a reward model or critic, not of a language model")
    base = base_of_adapter(path, base)
    return apply_adapter(load_policy(base).model, path, base)


def _four_bits() -> Any:
    """QLoRA's format: 4-bit NormalFloat, quantized block scales."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.adapter.quantize=nf4 needs bitsandbytes, which is not installed: "
            'pip install "lightning-hybrid[qlora]", or leave quantize out'
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def build_policy(architecture: dict[str, Any], vocab_size: int, chunk: int = 1024) -> Policy:
    """Build a causal LM with fresh weights.

    Args:
        architecture: ``model_type`` and the keyword arguments of its Transformers config.
        vocab_size: rows of the embedding, from the tokenizer.
        chunk: tokens per head call.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments = dict(architecture)
    model_type = arguments.pop("model_type", None)
    if model_type is None:
        raise ConfigError("model.architecture needs 'model_type' (llama, qwen2, gpt2, ...); it has none")
    config = AutoConfig.for_model(model_type, **{"vocab_size": vocab_size} | arguments)
    return Policy(AutoModelForCausalLM.from_config(config), chunk)


def load_scalar(path: str | Path, base: str | None = None) -> ScalarModel:
    """Load a critic or reward model; from a causal LM's folder the trunk is taken and the head starts at zero.

    A zero head makes the first values 0 instead of noise. A folder that holds an adapter only is merged into its base,
    which lies at ``base``, or where the adapter says.
    """
    from transformers import AutoModelForSequenceClassification

    if is_adapter_folder(path):
        if adapter_config(path).task_type != "SEQ_CLS":
            return scalar_from_policy(load_policy(path, base=base))
        base = base_of_adapter(path, base)
        return ScalarModel(apply_adapter(load_scalar(base).model, path, base))
    model, info = _from_pretrained(
        AutoModelForSequenceClassification, path, num_labels=1, output_loading_info=True, quiet=True
    )
    if any(key.startswith("score") for key in info["missing_keys"]):
        torch.nn.init.zeros_(model.score.weight)
    return ScalarModel(model)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name; one without a pad token pads with its EOS (masks decide)."""
    from transformers import AutoTokenizer

    if is_adapter_folder(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of_adapter(path)
    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_text_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response.

    The tokenizer's EOS, the token with which its chat template ends a turn, and those of the generation config.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: the model's.
    """
    configured = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    ids += configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in ids if i is not None})


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a chat template puts behind what the assistant says; None where there is none."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip()
    except (TemplateError, TypeError, ValueError, LookupError):  # refused in its place, where the data has turns
        return None
    ends = [token for token in tokenizer.all_special_tokens if text.endswith(token)]
    return tokenizer.convert_tokens_to_ids(max(ends, key=len)) if ends else None  # type: ignore[return-value]


def disable_dropout(module: torch.nn.Module) -> None:
    """Set every dropout to 0: with it, a policy differs from itself, and ratios are not 1 on fresh experience."""
    set_dropout(module, 0.0)


# By which layers keep a probability that they hand on to functions.
_PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout")


def set_dropout(module: torch.nn.Module, probability: float) -> None:
    """Set every dropout to a probability, and leave out no layers."""
    for part in module.modules():
        probabilities = ("p",) if isinstance(part, _DropoutNd) else _PROBABILITIES
        for name in probabilities:
            if type(getattr(part, name, None)) in (float, int):  # a whole number where the model's config has one
                setattr(part, name, probability)
        if type(getattr(part, "layerdrop", None)) in (float, int):
            part.layerdrop = 0.0  # type: ignore[assignment]


def max_positions(config: Any) -> int | None:
    """How many positions a model has, or None when its family has no limit (ALiBi)."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def _from_pretrained(auto: Any, path: str | Path, quiet: bool = False, **arguments: Any) -> Any:
    """``auto.from_pretrained`` in float32, with missing folders and unreachable hubs told apart."""
    from transformers.utils import logging

    if auto.__name__ != "AutoTokenizer":
        arguments["dtype"] = torch.float32
    verbosity = logging.get_verbosity()
    if quiet:
        logging.set_verbosity_error()
    try:
        return auto.from_pretrained(str(path), **arguments)
    except (OSError, ValueError) as error:
        raise ConfigError(why_not_loaded(path, error)) from error
    finally:
        logging.set_verbosity(verbosity)


def why_not_loaded(path: str | Path, error: Exception) -> str:
    """What is wrong with a path or hub name that Transformers could not load, and what to do."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        return f"model folder '{path}' cannot be loaded ({error}); it holds: {held}"
    if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        return f"model path '{path}' does not exist (looked in {folder.resolve()}); run the recipe that writes it first"
    return (
        f"model '{path}' is neither a folder here nor to be had from the hub ({type(error).__name__}); "
        "check the name, or the network, or give the path of a downloaded folder"
    )
