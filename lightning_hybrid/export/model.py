"""A policy or a scalar model as a Hugging Face folder, from whole weights or ZeRO-3 shards."""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_hybrid.checkpoint import folder as folders
from lightning_hybrid.engines.agreement import agree, own_rank
from lightning_hybrid.errors import CheckpointError, ConfigError
from lightning_hybrid.export.card import CardFacts, model_card
from lightning_hybrid.export.folder import reason_to_keep, refuse_to_replace, write_record
from lightning_hybrid.export.weights import (
    SHARD_BYTES,
    Slot,
    converted,
    gathered_values,
    slots_of,
    write_weights,
)
from lightning_hybrid.models import Policy, ScalarModel, base_of, end_of_text_ids
from lightning_hybrid.models.adapter_folder import is_adapter_folder
from lightning_hybrid.models.merging import (
    Entry,
    adapter_entries,
    as_published,
    merged_entries,
    published_config,
    reason_not_merged,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["merged", "adapter"]


def refuse_form(model: Any, form: Form) -> None:
    """Raise where a model cannot be exported so; nothing is gathered or written.

    Args:
        model: a Hugging Face model, or peft's around one.
        form: ``merged`` for a whole model, ``adapter`` for the adapter only.

    Raises:
        ConfigError: with the reason, and what can be done.
    """
    if form == "merged":
        reason = reason_not_merged(model)
        if reason is not None:
            raise ConfigError(f"export=merged: {reason}; give export=adapter, and merge it onto its base afterwards")
        return
    if not hasattr(model, "peft_config"):
        raise ConfigError("export=adapter: the model has no adapter; train one (adapter=lora), or give export=merged")
    adapter = _active_adapter(model)
    base = model.peft_config[adapter].base_model_name_or_path
    if not base:
        raise ConfigError("export=adapter: the base has no name that an adapter could be put on; give export=merged")
    if is_adapter_folder(base):
        raise ConfigError(
            f"export=adapter: the base '{base}' is itself an adapter, merged as it was loaded; give export=merged, or "
            f"begin with lightning-hybrid export model.path={base} output_dir=..."
        )


def refuse_config(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise where a whole model's configuration cannot be saved: Transformers judges it only when it is.

    Args:
        model: a Hugging Face model, or peft's around one.
        tokenizer: to be written beside it.

    Raises:
        ConfigError: with what Transformers says.
    """
    base = base_of(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            _write_config(Path(folder), base, (), tokenizer)
        except Exception as error:  # each family's configuration has checks of its own
            said = " ".join(str(error).split())
            raise ConfigError(
                f"export=merged: the configuration of {type(base).__name__} cannot be saved: {said} Mend the model's "
                "config.json or generation_config.json"
            ) from error


def export_model(
    wrapper: Policy | ScalarModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    form: Form = "merged",
    facts: CardFacts | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that ``from_pretrained`` loads; with several ranks all call it, and the first one writes.

    No rank's device holds more than one whole parameter beside its shards, and no adapter is ever added to the weights
    that are trained. The folder appears when it is complete; an earlier export is there until then.

    Args:
        wrapper: what to export.
        folder: where to; an earlier export is replaced, anything else refused.
        tokenizer: written beside the weights, with its chat template.
        form: ``merged`` for a whole model, ``adapter`` for the adapter only.
        facts: for the model card.
        shard_bytes: of one file of weights; an adapter's are in one.

    Raises:
        ConfigError: if the model cannot be exported so, on every rank.
        CheckpointError: on every rank where it could not be written; what was there before is untouched.
    """
    model, first = wrapper.model, own_rank() == 0
    refuse_form(model, form)
    entries = merged_entries(model) if form == "merged" else adapter_entries(model, _active_adapter(model))
    published = as_published(base_of(model), entries) if form == "merged" else entries
    values = gathered_values(published or entries, keep=first)
    result: Any = True
    try:
        if first:
            facts = facts or CardFacts()
            _write(folder, model, tokenizer, form, facts, shard_bytes, _files_of(model, published, entries, values))
    except Exception as error:
        result = error
    finally:
        for _ in values:  # the other ranks gather all of them
            pass
    try:
        agree(result, f"the export to '{folder}'", CheckpointError)
    finally:
        if first:
            folders.discard(folder)


def _active_adapter(model: Any) -> str:
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ConfigError(f"the model has {len(names)} active adapters, {names}: an export holds one")
    return str(names[0])


def _files_of(
    model: Any, published: Sequence[Entry] | None, entries: Sequence[Entry], values: Iterator[Tensor | None]
) -> tuple[list[Slot], Iterator[Tensor]]:
    """What the files of weights hold; read as it is written, or at once where tensors have to be put together."""
    kept = (value for value in values if value is not None)
    if published is not None:
        return slots_of(published), kept
    tensors = converted(base_of(model), dict(zip([entry.name for entry in entries], kept, strict=True)))
    return [Slot(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()], iter(tensors.values())


def _write(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    form: Form,
    facts: CardFacts,
    shard_bytes: int,
    weights: tuple[list[Slot], Iterator[Tensor]],
) -> None:
    refuse_to_replace(folder, reason_to_keep(folder))
    base = base_of(model)
    folders.discard(folder)
    unfinished = folders.beside(folder)
    unfinished.mkdir(parents=True)
    slots, values = weights
    if form == "merged":
        write_weights(unfinished, slots, values, "model", shard_bytes)
        _write_config(unfinished, base, slots, tokenizer)
    else:
        write_weights(unfinished, slots, values, "adapter_model", sys.maxsize)  # peft reads one file only
        _write_adapter_config(unfinished, model)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_text(model_card(facts, base, form), encoding="utf-8")
    write_record(unfinished, {"form": form, "base": _described_base(model, folder) if form == "adapter" else None})
    folders.complete(folder)


def _write_config(folder: Path, base: Any, slots: Sequence[Slot], tokenizer: PreTrainedTokenizerBase) -> None:
    config = published_config(base, {slot.name for slot in slots})
    text = config.get_text_config()
    if not base.can_generate() and text.pad_token_id is None:
        text.pad_token_id = tokenizer.pad_token_id  # by which a classifier finds each text's last token
    config.save_pretrained(folder)
    if base.can_generate():
        _write_generation_config(folder, base, tokenizer)


def _write_generation_config(folder: Path, base: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """With what ended a response in training, so that it ends one where others generate.

    That is put into the file: Transformers does not save a changed object that it would save as it was published.
    """
    base.generation_config.save_pretrained(folder)
    path, ends = folder / "generation_config.json", end_of_text_ids(base, tokenizer)
    content = json.loads(path.read_text(encoding="utf-8"))
    if ends:
        content["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_adapter_config(folder: Path, model: Any) -> None:
    config = copy.deepcopy(model.peft_config[_active_adapter(model)])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _described_base(model: Any, folder: Path) -> dict[str, Any]:
    """By which the base is found again, and known."""
    path = model.peft_config[_active_adapter(model)].base_model_name_or_path
    described = {"path": path, "fingerprint": getattr(model, "base_fingerprint", None)}
    return described | ({"relative": os.path.relpath(path, folder)} if Path(path).is_dir() else {})
