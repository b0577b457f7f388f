"""Adapters of peft: put on a model, and switched off for a while."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.policy import Policy, PolicyOutput
from lightning_hybrid.models.scalar import ScalarModel

if TYPE_CHECKING:
    from lightning_hybrid.config.adapters import AdapterConfig

ModelT = TypeVar("ModelT", Policy, ScalarModel)

SAMPLES = 1024
_BESIDE_LINEAR = "beside-linear-layers:"
# These of peft's ways to begin take something out of the base weights.
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def add_adapter(model: Any, config: AdapterConfig) -> Any:
    """Freeze a model's weights and put a fresh adapter beside them; the model answers as before until it is trained.

    Args:
        model: a Hugging Face causal LM, or a sequence classifier, whose head ``score`` is then trained too.
        config: of the adapter.

    Returns:
        peft's model around it. Its ``base_fingerprint`` says what the base was: a folder of the adapter keeps it.

    Raises:
        ConfigError: for target modules that the model has not, or that are not linear.
    """
    settings = adapter_settings(model, config)
    fingerprint = base_fingerprint(model)
    adapted = wrapped(model, settings)
    adapted.base_fingerprint = fingerprint
    return adapted


def adapter_settings(model: Any, config: AdapterConfig) -> Any:
    """What peft is told of an adapter on a model.

    Raises:
        ConfigError: for target modules that the model has not, or that are not linear.
    """
    import peft

    scalar = isinstance(getattr(model, "score", None), nn.Linear)
    layers = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules()}
    return peft.LoraConfig(
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
        target_modules=_targets(config.target_modules, layers),
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in layers.values()),
    )


def wrapped(model: Any, settings: Any) -> Any:
    """peft's model around a model, as its settings say."""
    import peft

    with warnings.catch_warnings():
        # peft reads a property that Transformers is about to rename.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return peft.get_peft_model(model, settings)


def with_adapter(model: ModelT, config: AdapterConfig | None) -> ModelT:
    """The policy or scalar model with a fresh adapter; itself where ``config`` is None."""
    if config is None:
        return model
    adapted = add_adapter(model.model, config)
    return Policy(adapted, model.chunk) if isinstance(model, Policy) else ScalarModel(adapted)


def has_adapter(model: Policy | ScalarModel) -> bool:
    """Whether peft's adapters are on it."""
    return hasattr(model.model, "peft_config")


def _targets(names: str | list[str], layers: dict[str, nn.Module]) -> str | list[str]:
    if isinstance(names, str):
        return names
    linear = sorted(name for name, module in layers.items() if _is_linear(module))
    wrong = [name for name in names if name not in linear]
    if wrong:
        raise ConfigError(
            f"adapter.target_modules = {names}: {wrong[0]!r} is no linear layer of this model; it has: "
            f"{', '.join(linear)}"
        )
    return names


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class AdaptersOff:
    """A policy's base, without a second copy of it: calls run the policy with its adapters switched off.

    No :class:`torch.nn.Module`, so that a module that holds it has no further child, and no engine for one. It calls
    the policy itself, so at ZeRO-3 weights are gathered as for the policy. Gradients and dropout are off; adapters,
    and every layer's mode, are as before afterwards, also after an exception.

    Args:
        policy: with adapters of peft.

    Raises:
        ConfigError: if it has none that can be switched off, or the base under them is not what it started from.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        if not list(_switches(policy)):
            raise ConfigError(
                "the policy has no LoRA adapters to switch off: put one on with adapter=lora, or give a reference model"
            )
        begun = {str(config.init_lora_weights) for config in policy.model.peft_config.values()}
        changed = [name for name in begun if name.startswith(CHANGES_THE_BASE)]
        if changed:
            raise ConfigError(
                f"adapters begun with init_lora_weights={changed[0]!r} take a part of the base weights with them: the "
                "base without them is not the model that training starts from; give a reference model"
            )

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> PolicyOutput:
        """What the base says; arguments and result are those of :meth:`Policy.forward`."""
        with _evaluating(self.policy), _switched_off(self.policy):
            output: PolicyOutput = self.policy(*args, **kwargs)
        return output

    def switched_off(self) -> AbstractContextManager[None]:
        """The policy is its base inside the block, whoever runs it, such as an engine that generates."""
        return _switched_off(self.policy)


def _switches(module: nn.Module) -> Iterator[Any]:
    """Layers of peft that have an on and an off."""
    return (inner for inner in module.modules() if isinstance(vars(inner).get("_disable_adapters"), bool))


@contextmanager
def _switched_off(module: nn.Module) -> Iterator[None]:
    # Not with peft's own `disable_adapter`: it makes weights require gradients, or not, under an engine's hooks.
    before = [(layer, layer._disable_adapters) for layer in _switches(module)]
    try:
        for layer, _ in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [inner for inner in module.modules() if inner.training]
    try:
        for inner in training:
            inner.training = False
        yield
    finally:
        for inner in training:
            inner.training = True


def base_fingerprint(model: nn.Module) -> str:
    """Tells a base from others: of names, shapes and some values of its parameters.

    Values are read as float32, evenly spread, at most 2 × :data:`SAMPLES` of each parameter: fine-tuning changes them
    all, and a large model takes no time. Where linear layers are quantized, it is of all else, such as embeddings and
    norms, which are as they were before, and says so.
    """
    quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
    return f"{_BESIDE_LINEAR}{_digest(model, _linear_weights(model))}" if quantized else _digest(model, set())


def is_fingerprint_of(fingerprint: str, model: nn.Module) -> bool:
    """Whether a model is the base that a fingerprint was taken of, before or after it was quantized."""
    if fingerprint.startswith(_BESIDE_LINEAR):
        return fingerprint == f"{_BESIDE_LINEAR}{_digest(model, _linear_weights(model))}"
    return fingerprint == base_fingerprint(model)


def _linear_weights(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if _is_linear(module)}


def _digest(model: nn.Module, without: set[str]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in without:
            continue
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLES)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
