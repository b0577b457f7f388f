"""What a checkpoint of a run, or a folder, holds: a model without engines, ready to be exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not list it

from lightning_hybrid.checkpoint import (
    Checkpoint,
    frozen_parameters,
    load_weights,
    newest_complete,
    refuse_other_weights,
    restore_frozen,
)
from lightning_hybrid.checkpoint.manifest import MANIFEST
from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.config.export import ExportedModelConfig
from lightning_hybrid.data.templates import use_template
from lightning_hybrid.engines.build import cast_parameters
from lightning_hybrid.errors import CheckpointError, ConfigError
from lightning_hybrid.export.card import CardFacts
from lightning_hybrid.models import (
    Policy,
    ScalarModel,
    build_policy,
    load_policy,
    load_scalar,
    load_tokenizer,
    scalar_from_policy,
    with_adapter,
)
from lightning_hybrid.models.adapter_folder import adapter_config, base_of_adapter, is_adapter_folder
from lightning_hybrid.models.loading import why_not_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = tuple[Policy | ScalarModel, "PreTrainedTokenizerBase", CardFacts]
PRECISIONS = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16, "16-true": torch.half, "16-mixed": torch.half}


def from_folder(config: ExportedModelConfig) -> Source:
    """A folder's model, an adapter merged into its base.

    Raises:
        ConfigError: if it cannot be loaded, or the adapter is not of that base.
    """
    path = str(config.path)
    adapter = is_adapter_folder(path)
    scalar = adapter_config(path).task_type == "SEQ_CLS" if adapter else _is_classifier(path)
    model = load_scalar(path, base=config.base) if scalar else load_policy(path, base=config.base)
    if not adapter:
        return model, load_tokenizer(config.tokenizer or path), CardFacts(base=path)
    facts = CardFacts(base=base_of_adapter(path, config.base), origin="An adapter was merged into it.")
    return model, load_tokenizer(config.tokenizer or path), facts


def _is_classifier(path: str) -> bool:
    from transformers import AutoConfig

    try:
        architectures = AutoConfig.from_pretrained(path).architectures
    except (OSError, ValueError) as error:
        raise ConfigError(why_not_loaded(path, error)) from error
    return any(name.endswith("ForSequenceClassification") for name in architectures or ())


def from_checkpoint(folder: str, child: str | None, given: ExportedModelConfig) -> Source:
    """A model of a run as its checkpoint holds it, in the precision that the run computed with.

    Args:
        folder: of the checkpoint, or of checkpoints, of which the newest complete one is taken.
        child: which engine's; None for the policy's, or the only one.
        given: what to use instead of what the checkpoint says of its run.

    Raises:
        CheckpointError: if the checkpoint is not what was written, has no such engine, or is of another model.
        ConfigError: if the model that it began with cannot be loaded.
    """
    checkpoint = Checkpoint(_newest(Path(folder)))
    name = _engine(checkpoint, child)
    run: Mapping[str, Any] = checkpoint.manifest["config"] or {}
    with _says_what_to_give(folder):
        tokenizer = _tokenizer(run, given, folder)
        start = given.path or _start(run, name, tokenizer)
        model = _as_it_began(checkpoint, name, start, run.get("model") or {}, tokenizer)
    try:
        _fill(checkpoint, name, model)
    except CheckpointError as error:
        began = f"loaded was '{start}'" if start else "loaded was the architecture"
        raise CheckpointError(f"{error}; {began}: give model.path if the run began with another one") from error
    facts = CardFacts(
        base=start,
        config=run or None,
        data=_data(checkpoint),
        metrics=checkpoint.manifest.get("metrics") or {},
        step=checkpoint.manifest["global_step"],
        origin=f"The weights are of the checkpoint `{checkpoint.folder.name}`, the model's `{name}`.",
    )
    return model, tokenizer, facts


def _newest(folder: Path) -> Path:
    inside = None if (folder / MANIFEST).is_file() else newest_complete(folder)
    return inside or folder


def _engine(checkpoint: Checkpoint, child: str | None) -> str:
    names = checkpoint.manifest["engines"]
    if child is None:
        child = names[0] if len(names) == 1 else "actor"
    if child not in names:
        raise CheckpointError(f"checkpoint '{checkpoint.folder}' has no model {child!r}: give child, one of {names}")
    return child


def _needed(value: str | None, key: str, folder: str) -> str:
    if value is None:
        raise ConfigError(f"checkpoint '{folder}' does not say where its run's model lies: give model.{key}")
    return value


@contextmanager
def _says_what_to_give(folder: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"what the run of checkpoint '{folder}' began with cannot be loaded: {error}. If it lies elsewhere now, "
            "give model.path, and model.tokenizer for its tokenizer"
        ) from error


def _tokenizer(run: Mapping[str, Any], given: ExportedModelConfig, folder: str) -> PreTrainedTokenizerBase:
    """With the template that the run's data gave it; one that is given with a template of its own keeps that."""
    settings = run.get("model") or {}
    path = given.tokenizer or settings.get("tokenizer") or given.path or settings.get("path")
    tokenizer = load_tokenizer(_needed(path, "tokenizer", folder))
    template = _template(run)
    if template is not None and not (given.tokenizer and tokenizer.chat_template):
        use_template(tokenizer, template)
    return tokenizer


def _template(run: Mapping[str, Any]) -> str | None:
    """The name of the one that the tokenizer had in the end: texts beside the rollouts come after the prompts."""
    read = (run.get(name) or {} for name in ("ptx", "data"))
    templates: Iterator[str] = (data["template"] for data in read if data.get("path") and data.get("template"))
    return next(templates, None)


def _start(run: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where a model began; a critic as :func:`~lightning_hybrid.modules.roles.make_critic` chooses."""
    settings, reward = run.get("model") or {}, (run.get("reward") or {}).get("path")
    start: str | None = settings.get("path")
    if name != "critic":
        return start
    if settings.get("critic") is not None:
        return str(settings["critic"])
    return reward if reward is not None and load_tokenizer(reward).get_vocab() == tokenizer.get_vocab() else start


def _as_it_began(
    checkpoint: Checkpoint, name: str, start: str | None, settings: Mapping[str, Any], tokenizer: Any
) -> Policy | ScalarModel:
    trained = checkpoint.summary(name)["parameters"]
    architecture = settings.get("architecture")
    given = settings.get("critic_adapter" if name == "critic" else "adapter")
    adapter = None if given is None else AdapterConfig(**given)
    scalar = any(".score." in parameter for parameter in trained)
    if start is None and architecture is not None:
        policy = build_policy(architecture, len(tokenizer))
        return scalar_from_policy(policy) if scalar else policy
    start = _needed(start, "path", str(checkpoint.folder))
    if scalar:
        return with_adapter(load_scalar(start), adapter)
    return with_adapter(load_policy(start, quantize=adapter.quantize if adapter else None), adapter)


def _fill(checkpoint: Checkpoint, name: str, model: Policy | ScalarModel) -> None:
    load_weights(checkpoint, name, model)
    saved = checkpoint.summary(name)["parameters"]
    missing = sorted(key for key, p in model.named_parameters() if p.requires_grad and key not in saved)
    if missing:
        raise CheckpointError(
            f"checkpoint '{checkpoint.folder}' is of another model: it has no {missing[0]!r}, nor {len(missing) - 1} "
            "more parameters of the one that was loaded"
        )
    cast_parameters(model, PRECISIONS.get(checkpoint.manifest["precision"], torch.float32))
    frozen = checkpoint.manifest["frozen"].get(name)
    if not frozen_parameters(model) or frozen is None:
        return
    with _alone_in_group():
        if frozen == "value":
            restore_frozen(model, checkpoint.stretches(f"frozen/{name}"))
        else:
            refuse_other_weights(name, model, frozen)


@contextmanager
def _alone_in_group() -> Iterator[None]:
    """Frozen weights are read by all ranks together; here there is one."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _data(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What the run's data module read, as Lightning keeps it: under the class's name."""
    state = checkpoint.lightning_state()
    return next((held for held in state.values() if isinstance(held, dict) and "files" in held), None)
