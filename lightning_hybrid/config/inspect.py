"""Settings of the recipe `inspect`: any of the data groups, a tokenizer, and what to show."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import NonNegativeInt, PositiveInt

from lightning_hybrid.config.data import (
    InstructionDataConfig,
    PreferenceDataConfig,
    PromptDataConfig,
    UnpairedDataConfig,
)
from lightning_hybrid.config.validate import validate
from lightning_hybrid.settings import Problem, Rule, Settings


def _tokens_come_from_somewhere(config: InspectedModelConfig) -> Problem | None:
    if config.path is not None or config.tokenizer is not None:
        return None
    return Problem("path", "give model.path, or model.tokenizer where there is no model yet", "nothing")


class InspectedModelConfig(Settings):
    """The model whose tokens are counted; its weights are not read."""

    rules: ClassVar[tuple[Rule, ...]] = (_tokens_come_from_somewhere,)

    path: str | None = None
    """folder or hub name of the model: its tokenizer, and its number of positions"""
    tokenizer: str | None = None
    """folder or hub name of the tokenizer; null for the one beside the model"""


class InspectRun(Settings):
    """Configuration of the recipe `inspect`, before it is known what kind of data is looked at."""

    model: InspectedModelConfig
    """the model whose tokens are counted"""
    data: dict[str, Any]
    """what to look at: a choice of the group `data`"""
    samples: NonNegativeInt = 3
    """rows that are shown token by token"""
    sample_tokens: PositiveInt = 200
    """tokens that are shown of each"""
    max_new_tokens: PositiveInt = 64
    """of prompts: tokens that must fit behind each, as rollout.max_new_tokens"""
    color: bool | None = None
    """colours instead of brackets in what is printed; null for where a terminal shows them (or FORCE_COLOR is set)"""
    seed: NonNegativeInt = 0
    """order of the rows"""
    root: str = "outputs"
    """folder that the stages of one experiment share; other values refer to it as ${root}"""
    shared: str | None = None
    """folder with models and data that come from elsewhere; other values refer to it as ${shared}"""
    output_dir: str
    """folder that the picture is written to"""


class InspectInstructions(InspectRun):
    """Texts to learn are looked at."""

    data: InstructionDataConfig  # type: ignore[assignment]
    """texts to learn"""


class InspectPreferences(InspectRun):
    """Pairs are looked at."""

    data: PreferenceDataConfig  # type: ignore[assignment]
    """pairs of a preferred and another text"""


class InspectUnpaired(InspectRun):
    """Labelled responses are looked at."""

    data: UnpairedDataConfig  # type: ignore[assignment]
    """single responses, each desirable or not"""


class InspectPrompts(InspectRun):
    """Prompts are looked at."""

    data: PromptDataConfig  # type: ignore[assignment]
    """prompts to respond to"""


AnyInspection = InspectInstructions | InspectPreferences | InspectUnpaired | InspectPrompts

# The first key that is there tells the kind of data; each kind's choices of the group have it.
_KINDS: dict[str, type[AnyInspection]] = {
    "chosen_key": InspectPreferences,
    "label_key": InspectUnpaired,
    "response_key": InspectInstructions,
}


def with_kind(run: InspectRun) -> AnyInspection:
    """The configuration with the settings of the kind of data that it names.

    Raises:
        ConfigError: listing all problems of the data's settings.
    """
    schema = next((schema for key, schema in _KINDS.items() if key in run.data), InspectPrompts)
    return validate(schema, run.model_dump())


__all__ = ["AnyInspection", "InspectRun", "with_kind"]
