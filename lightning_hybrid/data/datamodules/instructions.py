"""Prompts with responses, conversations, or whole texts, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

from lightning_hybrid.data import packing, schemas
from lightning_hybrid.data.checking import Problems, pad_id
from lightning_hybrid.data.datamodules.chatting import AnswerArguments, AnswerDataModule, refuse_row_groups
from lightning_hybrid.data.encoding import EncodedText
from lightning_hybrid.data.instructions import (
    Dialogue,
    Instruction,
    collate_instructions,
    encode_instructions,
    read_instructions,
)
from lightning_hybrid.data.reading import Paths, Row
from lightning_hybrid.data.recognition import Recogniser
from lightning_hybrid.errors import ConfigError


class InstructionDataModule(AnswerDataModule[Instruction | Dialogue]):
    """Prompts with responses, conversations, or whole texts, for supervised fine-tuning.

    Batches: ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T] and ``loss_mask`` Bool[B, T], padded on the right;
    ``loss_mask`` is True on the tokens of responses and their EOS.

    Args:
        path: File, folder of `Dataset.save_to_disk`, name on the Hugging Face hub, or several; see `read_rows`.
        tokenizer: The model's. ``None``: the ``tokenizer`` of the module that is trained.
        batch_size: Rows of one batch on each rank.
        format: See `read_rows`.
        encoding: Of the text in the files.
        limit: Use the first rows only; of each path, where they are mixed.
        seed: Of the order in training.
        validation_fraction: Share of the rows kept for validation, chosen by a hash of the row.
        validation_path: File or files for validation instead.
        num_workers: Processes that collate batches.
        max_length: Most tokens of a row; ``None``, or more than the model that is trained has positions: those.
        too_long: What happens to longer rows: ``drop`` (counted), ``truncate`` (the end), ``error``.
        schema: What the columns mean; ``auto`` tells by their names, ``keys`` goes by the arguments that name columns.
        mix: Shares of the paths in what is drawn, one for each; ``None``: every row once.
        streaming: Leave the rows in their files, and read them for each batch.
        split: Which split of a data set that has several.
        name: Which configuration of a data set on the hub that has several.
        prompt_key: Name of the prompt in a row; ``None`` where the whole text is learned.
        response_key: Name of the response in a row.
        packing: Put several texts into each row of ``max_length`` tokens, none of which sees another; ``batch_size``
            then counts such rows. Batches gain ``position_ids`` Long[B, T] and ``sequence`` Long[B, T], 0 on padding
            and 1, 2, ... on the texts of a row.
        template: As ``chat``, ``system`` and ``bos``: see `ChatDataModule`.
        add_eos: As ``balance``: see `AnswerDataModule`.

    Raises:
        ConfigError: If an argument has a value that it cannot have.
    """

    _task = "instructions"
    _default_keys = {"prompt_key": "prompt", "response_key": "response"}

    def __init__(
        self,
        path: Paths,
        *,
        prompt_key: str | None = "prompt",
        response_key: str = "response",
        packing: bool = False,
        **common: Unpack[AnswerArguments],
    ) -> None:
        super().__init__(path, **common)
        if packing and self.balance:
            raise ConfigError("packing and balance are both set: packed rows are of like length, so unset balance")
        self.prompt_key = prompt_key
        self.response_key = response_key
        self.packing = packing

    def _examples(
        self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems
    ) -> list[Instruction | Dialogue]:
        def by_keys(rows: Sequence[Row]) -> list[Instruction]:
            return read_instructions(rows, self.prompt_key, self.response_key, problems)

        return schemas.instructions_of(rows, recogniser, by_keys, problems)

    def _encode(self, examples: Sequence[Instruction | Dialogue], source: str) -> list[EncodedText]:
        dropped = self._count_dropped(source, examples)
        return encode_instructions(examples, self._answers(add_eos=self.add_eos), self._rule(), dropped)

    def _dataset(self, examples: Any, source: str, *, training: bool) -> Any:
        texts = super()._dataset(examples, source, training=training)
        room = self._rule().room
        if not self.packing:
            return texts
        if room is None:
            raise ConfigError("packing needs to know how long rows are, and the model has no limit: set max_length")
        refuse_row_groups(texts, "packing")
        return packing.PackedDataset(texts, room)

    def _collator(self) -> Callable[[Any], Any]:
        if self.packing:
            return partial(packing.collate_packed, fill=pad_id(self._tokens()))
        return partial(collate_instructions, fill=pad_id(self._tokens()))
