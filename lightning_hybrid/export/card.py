"""The model card: what a model is, what it comes from, what it was trained on and how."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hybrid.checkpoint.manifest import versions
from lightning_hybrid.settings import without_credentials

if TYPE_CHECKING:
    import lightning as L

END = 3  # parts of a path
OF_THE_MACHINE = ("engine/", "memory/", "seconds/", "throughput/")


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside what the model itself does; whatever is not known is left out.

    Attributes:
        base: path or hub name of the model that training started from.
        config: of the run.
        data: what was read, as :meth:`~lightning_hybrid.data.TextDataModule.state_dict` says it.
        metrics: the last of each, see :func:`last_metrics`.
        step: steps of the Trainer.
        origin: a sentence on where the weights come from, for those that no training has just ended on.
    """

    base: str | None = None
    config: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None
    origin: str | None = None


def model_card(facts: CardFacts, model: Any, form: str) -> str:
    """The text of ``README.md``.

    Args:
        facts: of the training.
        model: the Hugging Face model inside.
        form: ``merged`` or ``adapter``.
    """
    sections = [_head(facts, model, form), _introduction(facts, model, form), _use(model, form)]
    sections += [_data(facts), _metrics(facts), _config(facts), _versions()]
    return "\n\n".join(section for section in sections if section) + "\n"


def last_metrics(trainer: L.Trainer) -> dict[str, float]:
    """The last value of each metric but those of the machine, which no two runs have alike."""
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if not name.startswith(OF_THE_MACHINE)}


def portable(text: str) -> str:
    """A path without what it says about the machine: from the current folder, from ``~``, or its end.

    Addresses lose users, passwords and queries.

    Args:
        text: a path, an address, or anything else.
    """
    text = without_credentials(text)
    for start, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        prefix = f"{start}/"
        if text.startswith(prefix) and str(start) != "/":
            return short + text.removeprefix(prefix)
    parts = Path(text).parts if text.startswith("/") else ()
    return f"…/{'/'.join(parts[-END:])}" if len(parts) > END + 1 else text


def _head(facts: CardFacts, model: Any, form: str) -> str:
    lines = ["---", "library_name: " + ("peft" if form == "adapter" else "transformers")]
    if facts.base is not None and _is_hub_name(facts.base):
        lines.append(f"base_model: {facts.base}")
    task = "text-generation" if model.can_generate() else "text-classification"
    return "\n".join([*lines, f"pipeline_tag: {task}", "tags:", "- lightning-hybrid", "---"])


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _introduction(facts: CardFacts, model: Any, form: str) -> str:
    kind = "a language model" if model.can_generate() else "a reward model or critic, one number per text"
    what = f"{type(model).__name__}, {kind}, {model.config.model_type} family"
    what += ": an adapter, to be used with its base" if form == "adapter" else ""
    start = f" It was trained from `{portable(facts.base)}`" if facts.base else ""
    steps = f" for {facts.step:,} steps" if facts.base and facts.step is not None else ""
    origin = f" {facts.origin}" if facts.origin else ""
    return f"# {type(model).__name__}\n\n{what}.{start}{steps}{'.' if start else ''}{origin}"


def _use(model: Any, form: str) -> str:
    auto = "CausalLM" if model.can_generate() else "SequenceClassification"
    library, prefix = ("peft", "AutoPeftModelFor") if form == "adapter" else ("transformers", "AutoModelFor")
    return (
        f'```python\nfrom {library} import {prefix}{auto}\n\nmodel = {prefix}{auto}.from_pretrained("this-folder")\n```'
    )


def _data(facts: CardFacts) -> str:
    files = (facts.data or {}).get("files") or []
    if not files:
        return ""
    rows = [
        f"| {portable(str(file.get('name')))} | {file.get('rows', 0):,} | {file.get('bytes', 0):,} "
        f"| `{file.get('sha256') or 'not known'}` |"
        for file in files
    ]
    return "\n".join(["## Data", "", "| file | rows | bytes | SHA-256 |", "|---|---|---|---|", *rows])


def _metrics(facts: CardFacts) -> str:
    if not facts.metrics:
        return ""
    rows = [f"| {name} | {_number(value)} |" for name, value in sorted(facts.metrics.items())]
    return "\n".join(["## Last metrics", "", "| metric | value |", "|---|---|", *rows])


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else str(value)


def _config(facts: CardFacts) -> str:
    if not facts.config:
        return ""
    import yaml

    text = yaml.safe_dump(_portable_values(facts.config), sort_keys=False, allow_unicode=True)
    return f"## Configuration\n\n```yaml\n{text}```"


def _portable_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _portable_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable_values(item) for item in value]
    return portable(value) if isinstance(value, str) else value


def _versions() -> str:
    rows = [f"- {name} {version}" for name, version in versions().items()]
    return "\n".join(["## Versions", "", *rows])
