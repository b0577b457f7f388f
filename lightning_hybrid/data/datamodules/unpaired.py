"""Single responses, each desirable or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

from lightning_hybrid.data import schemas, unpaired
from lightning_hybrid.data.checking import Problems, pad_id
from lightning_hybrid.data.datamodules.chatting import AnswerArguments, AnswerDataModule
from lightning_hybrid.data.preferences import LabelledResponse, TextEncoder
from lightning_hybrid.data.reading import Paths, Row
from lightning_hybrid.data.recognition import Recogniser


class UnpairedDataModule(AnswerDataModule[LabelledResponse]):
    """Single responses, each desirable or not, for learning from such labels without pairs.

    Batches: ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T], ``loss_mask`` Bool[B, T], True on the response and
    its EOS, padded on the right, and ``desirable`` Bool[B]. Truncating keeps BOS and the end of a text.

    Args:
        path: As all common arguments: see `InstructionDataModule`.
        prompt_key: Name of the prompt in a row; ``None`` where the response is a whole text.
        response_key: Name of the response in a row.
        label_key: Name of the label in a row: true or 1 where such a response is desired, false or 0 where not.
        template: As ``chat``, ``system`` and ``bos``: see `ChatDataModule`.
        add_eos: As ``balance``: see `AnswerDataModule`.

    Raises:
        ConfigError: If an argument has a value that it cannot have.
    """

    _task = "labelled"
    _default_keys = {"prompt_key": "prompt", "response_key": "response", "label_key": "label"}

    def __init__(
        self,
        path: Paths,
        *,
        prompt_key: str | None = "prompt",
        response_key: str = "response",
        label_key: str = "label",
        **common: Unpack[AnswerArguments],
    ) -> None:
        super().__init__(path, **common)
        self.prompt_key = prompt_key
        self.response_key = response_key
        self.label_key = label_key

    def _examples(self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems) -> list[LabelledResponse]:
        def by_keys(rows: Sequence[Row]) -> list[LabelledResponse]:
            return unpaired.read_unpaired(rows, self.prompt_key, self.response_key, self.label_key, problems)

        return schemas.labelled_of(rows, recogniser, by_keys, problems)

    def _encode(self, examples: Sequence[LabelledResponse], source: str) -> list[unpaired.EncodedResponse]:
        encoder = TextEncoder(self._answers(add_eos=self.add_eos), self._rule())
        return unpaired.encode_unpaired(examples, encoder, self._count_dropped(source, examples))

    def _refuse_training_on(self, dataset: Any, source: str) -> None:
        unpaired.refuse_one_label(dataset, source)

    def _collator(self) -> Callable[[Any], Any]:
        return partial(unpaired.collate_unpaired, fill=pad_id(self._tokens()))
