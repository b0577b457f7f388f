"""Prompts for reinforcement learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, Unpack

from lightning_hybrid.data import prompts, schemas
from lightning_hybrid.data.checking import Problems
from lightning_hybrid.data.datamodules.arguments import check_positive
from lightning_hybrid.data.datamodules.chatting import ChatArguments, ChatDataModule
from lightning_hybrid.data.reading import Paths, Row, file_of
from lightning_hybrid.data.recognition import Recogniser
from lightning_hybrid.errors import ConfigError, DataError


class PromptDataModule(ChatDataModule[prompts.Prompt]):
    """Prompts for reinforcement learning; training batches are always full.

    Batches: see `PromptBatch`. Truncating keeps BOS and the end of a prompt.

    Args:
        path: As all common arguments: see `InstructionDataModule`.
        prompt_key: Name of the prompt in a row.
        first_words: Cut each text to its first words; repeated prompts are then dropped, and counted.
        max_new_tokens: Tokens that must fit within ``max_length`` behind each prompt; ``None``: what the module that is
            trained will sample.
        template: As ``chat``, ``system`` and ``bos``: see `ChatDataModule`.

    Raises:
        ConfigError: If an argument has a value that it cannot have.
    """

    _drop_last = True
    _task = "prompts"
    _default_keys = {"prompt_key": "prompt"}

    def __init__(
        self,
        path: Paths,
        *,
        prompt_key: str = "prompt",
        first_words: int | None = None,
        max_new_tokens: int | None = None,
        **common: Unpack[ChatArguments],
    ) -> None:
        super().__init__(path, **common)
        check_positive("first_words", first_words)
        check_positive("max_new_tokens", max_new_tokens)
        self.prompt_key = prompt_key
        self.first_words = first_words
        self.max_new_tokens = max_new_tokens
        self._columns: dict[str, dict[str, None]] = {}

    @property
    def columns(self) -> dict[str, list[str]]:
        """The columns beside the prompt that rows of each file have, by its name; known once the data is set up."""
        return {name: [*columns] for name, columns in self._columns.items()}

    def _examples(self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems) -> list[prompts.Prompt]:
        def by_keys(rows: Sequence[Row]) -> list[prompts.Prompt]:
            return prompts.read_prompts(rows, self.prompt_key, problems)

        found = schemas.prompts_of(rows, recogniser, by_keys, problems)
        if self.first_words is not None:
            found = prompts.cut_to_first_words(found, self.first_words, problems)
        found = [prompts.with_turns(example, self.chat, problems) for example in found]
        for example in found:
            self._columns.setdefault(file_of(example.where), {}).update(dict.fromkeys(example.fields))
        return found

    def _encode(self, examples: Sequence[prompts.Prompt], source: str) -> list[prompts.EncodedPrompt]:
        rule = self._rule(reserve=self._reserve())
        return prompts.encode_prompts(examples, self._answers(), rule, self._count_dropped(source, examples))

    def _settled(self) -> Self:
        settled = super()._settled()
        settled.max_new_tokens = self._reserve()
        return settled

    def _refuse_streaming(self) -> None:
        if self.first_words is not None:
            raise ConfigError("first_words keeps each prompt once, which takes all of them: set streaming=false")

    def _placed(self, item: prompts.EncodedPrompt, index: int) -> prompts.EncodedPrompt:
        return replace(item, index=index)

    def _refuse_training_on(self, dataset: Any, source: str) -> None:
        ranks = self.trainer.world_size if self.trainer is not None else 1
        if len(dataset) < self.batch_size * ranks:
            raise DataError(
                f"{source} gives {len(dataset):,} prompts, fewer than one batch: batch_size {self.batch_size} × "
                f"{ranks} ranks = {self.batch_size * ranks}; lower batch_size or add prompts"
            )

    def _reserve(self) -> int:
        rollout = getattr(self._module(), "rollout_config", None)
        configured = getattr(rollout, "max_new_tokens", 64)
        return int(configured if self.max_new_tokens is None else self.max_new_tokens)

    def _collator(self) -> Callable[[Any], Any]:
        every = dict.fromkeys(name for columns in self._columns.values() for name in columns)
        return partial(prompts.collate_prompts, columns=[*every])
