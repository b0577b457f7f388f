"""The data modules: prompts with responses, preferences, labelled responses, and prompts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self, Unpack, get_args

from lightning_hybrid.data import instructions, packing, preferences, prompts, schemas, unpaired
from lightning_hybrid.data.base import Paths, check_choice, check_positive
from lightning_hybrid.data.chatting import AnswerArguments, AnswerDataModule, ChatArguments, ChatDataModule
from lightning_hybrid.data.checking import Problems, pad_id
from lightning_hybrid.data.encoding import EncodedText
from lightning_hybrid.data.reading import Row
from lightning_hybrid.data.recognition import Recogniser
from lightning_hybrid.errors import ConfigError, DataError

Pairing = Literal["rows", "labels"]


class InstructionDataModule(AnswerDataModule[instructions.Instruction | instructions.Dialogue]):
    """Prompts with responses, conversations, or whole texts, for supervised fine-tuning.

    Batches: ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T] and ``loss_mask`` Bool[B, T], padded on the right;
    ``loss_mask`` is True on the tokens of responses and their EOS.

    Args:
        path: File or files; see `read_rows`.
        tokenizer: The model's. ``None``: the ``tokenizer`` of the module that is trained.
        batch_size: Rows of one batch on each rank.
        format: See `read_rows`.
        encoding: Of the text in the files.
        limit: Use the first rows only.
        seed: Of the order in training.
        validation_fraction: Share of the rows kept for validation, chosen by a hash of the row.
        validation_path: File or files for validation instead.
        num_workers: Processes that collate batches.
        max_length: Most tokens of a row; ``None``: the positions of the model that is trained.
        too_long: What happens to longer rows: ``drop`` (counted), ``truncate`` (the end), ``error``.
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

    def _refuse_streaming(self) -> None:
        super()._refuse_streaming()
        if self.packing:
            raise ConfigError("packing needs the length of every row, which streaming does not know: unset one of them")

    def _examples(
        self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems
    ) -> list[instructions.Instruction | instructions.Dialogue]:
        def by_keys(rows: Sequence[Row]) -> list[instructions.Instruction]:
            return instructions.read_instructions(rows, self.prompt_key, self.response_key, problems)

        return schemas.instructions_of(rows, recogniser, by_keys, problems)

    def _encode(
        self, examples: Sequence[instructions.Instruction | instructions.Dialogue], source: str
    ) -> list[EncodedText]:
        dropped = self._count_dropped(source, examples)
        return instructions.encode_instructions(examples, self._answers(add_eos=self.add_eos), self._rule(), dropped)

    def _dataset(self, examples: Any, source: str, *, training: bool) -> Any:
        texts = super()._dataset(examples, source, training=training)
        room = self._rule().room
        if not self.packing:
            return texts
        if room is None:
            raise ConfigError("packing needs to know how long rows are, and the model has no limit: set max_length")
        return packing.PackedDataset(texts, room)

    def _collator(self) -> Callable[[Any], Any]:
        if self.packing:
            return partial(packing.collate_packed, fill=pad_id(self._tokens()))
        return partial(instructions.collate_instructions, fill=pad_id(self._tokens()))


class PreferenceDataModule(AnswerDataModule[preferences.Preference | preferences.LabelledText]):
    """Pairs of a chosen and a rejected text, for reward models and for learning from preferences directly.

    Batches: ``chosen`` and ``rejected``, each with ``input_ids`` Long[B, T], ``attention_mask`` Bool[B, T] and
    ``loss_mask`` Bool[B, T], True on the response and its EOS, padded on the right, and ``margin`` Float[B] where rows
    have one. Truncating keeps BOS and the end of a text.

    Args:
        path: As all common arguments: see `InstructionDataModule`.
        chosen_key: Name of the better text in a row.
        rejected_key: Name of the other one.
        prompt_key: Name of the prompt that both answer; ``None`` where the texts contain it.
        margin_key: Name of the number that says by how much; ``None`` where there is none.
        pairing: ``rows``: each row is a pair. ``labels``: rows have ``text`` and ``label``, and a pair is a text of
            label 1 over one of label 0, drawn by seed and epoch.
        pairs: Pairs of one epoch with ``labels``; ``None``: as many as rows.
        template: As ``chat``, ``system`` and ``bos``: see `ChatDataModule`.
        add_eos: As ``balance``: see `AnswerDataModule`.

    Raises:
        ConfigError: If an argument has a value that it cannot have.
    """

    _task = "preferences"
    _default_keys = {"chosen_key": "chosen", "rejected_key": "rejected", "prompt_key": None}

    def __init__(
        self,
        path: Paths,
        *,
        chosen_key: str = "chosen",
        rejected_key: str = "rejected",
        prompt_key: str | None = None,
        margin_key: str | None = None,
        pairing: Pairing = "rows",
        pairs: int | None = None,
        **common: Unpack[AnswerArguments],
    ) -> None:
        super().__init__(path, **common)
        check_choice("pairing", pairing, get_args(Pairing))
        check_positive("pairs", pairs)
        if pairing == "labels" and self.balance:
            raise ConfigError("balance needs pairs whose lengths are known beforehand: unset it, or pairing=rows")
        self.chosen_key = chosen_key
        self.rejected_key = rejected_key
        self.prompt_key = prompt_key
        self.margin_key = margin_key
        self.pairing: Pairing = pairing
        self.pairs = pairs
        self._validation_texts: list[preferences.LabelledText] = []

    def validation_texts(self) -> tuple[list[str], list[str]]:
        """Return the positive and the negative texts kept for validation, to be scored once each over all pairs.

        Raises:
            DataError: If pairs are not drawn from labels, or no rows are kept for validation.
        """
        self.setup()
        if not self._validation_texts:
            raise DataError(
                f"no labelled texts for validation: pairing is {self.pairing!r} (needs 'labels'), validation_path "
                f"{self.validation_path!r}, validation_fraction {self.validation_fraction}"
            )
        positive = [example.text for example in self._validation_texts if example.positive]
        return positive, [example.text for example in self._validation_texts if not example.positive]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of whole texts as the batches have them: with BOS and EOS, cut to the limit."""
        return self._encoder()(texts)

    def _examples(
        self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems
    ) -> list[preferences.Preference | preferences.LabelledText]:
        if self.pairing == "labels":
            return [*preferences.read_labelled(rows, problems)]
        keys = (self.chosen_key, self.rejected_key, self.prompt_key, self.margin_key)

        def by_keys(rows: Sequence[Row]) -> list[preferences.Preference]:
            return preferences.read_preferences(rows, *keys, problems)

        return [*schemas.preferences_of(rows, recogniser, by_keys, self.margin_key, problems)]

    def _dataset(self, examples: Any, source: str, *, training: bool) -> Any:
        if self.pairing == "labels":
            return self._pairs(examples, source, training=training)
        return super()._dataset(examples, source, training=training)

    def _encode(
        self, examples: Sequence[preferences.Preference | preferences.LabelledText], source: str
    ) -> list[preferences.EncodedPreference]:
        rows = [example for example in examples if isinstance(example, preferences.Preference)]
        return preferences.encode_preferences(rows, self._encoder(), self._count_dropped(source, rows))

    def _refuse_streaming(self) -> None:
        if self.pairing == "labels":
            raise ConfigError("pairing=labels draws from all texts, so they cannot be streamed: set streaming=false")

    def _pairs(
        self, examples: list[preferences.LabelledText], source: str, *, training: bool
    ) -> preferences.PairDataset:
        kept, texts = preferences.encode_labelled(examples, self._encoder(), self._count_dropped(source, examples))
        positive = [text for example, text in zip(kept, texts, strict=True) if example.positive]
        negative = [text for example, text in zip(kept, texts, strict=True) if not example.positive]
        if training:
            return preferences.PairDataset(positive, negative, self.pairs or len(kept), self.seed, self._epoch)
        self._validation_texts = kept
        return preferences.PairDataset(positive, negative, len(kept), self.seed)

    def _encoder(self) -> preferences.TextEncoder:
        return preferences.TextEncoder(self._answers(add_eos=self.add_eos), self._rule())

    def _collator(self) -> Callable[[Any], Any]:
        return partial(preferences.collate_preferences, fill=pad_id(self._tokens()))


class UnpairedDataModule(AnswerDataModule[preferences.LabelledResponse]):
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

    def _examples(
        self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems
    ) -> list[preferences.LabelledResponse]:
        def by_keys(rows: Sequence[Row]) -> list[preferences.LabelledResponse]:
            return unpaired.read_unpaired(rows, self.prompt_key, self.response_key, self.label_key, problems)

        return schemas.labelled_of(rows, recogniser, by_keys, problems)

    def _encode(self, examples: Sequence[preferences.LabelledResponse], source: str) -> list[unpaired.EncodedResponse]:
        encoder = preferences.TextEncoder(self._answers(add_eos=self.add_eos), self._rule())
        return unpaired.encode_unpaired(examples, encoder, self._count_dropped(source, examples))

    def _dataset(self, examples: Any, source: str, *, training: bool) -> Any:
        responses = super()._dataset(examples, source, training=training)
        if training and isinstance(responses, list) and self.mix is None:
            unpaired.refuse_one_label(responses, source)
        return responses

    def _collator(self) -> Callable[[Any], Any]:
        return partial(unpaired.collate_unpaired, fill=pad_id(self._tokens()))


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

    def _examples(self, rows: Sequence[Row], recogniser: Recogniser, problems: Problems) -> list[prompts.Prompt]:
        def by_keys(rows: Sequence[Row]) -> list[prompts.Prompt]:
            return prompts.read_prompts(rows, self.prompt_key, problems)

        found = schemas.prompts_of(rows, recogniser, by_keys, problems)
        return found if self.first_words is None else prompts.cut_to_first_words(found, self.first_words, problems)

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

    def _refuse_size(self, count: int, source: str) -> None:
        ranks = self.trainer.world_size if self.trainer is not None else 1
        if count < self.batch_size * ranks:
            raise DataError(
                f"{source} gives {count:,} prompts, fewer than one batch: batch_size {self.batch_size} × "
                f"{ranks} ranks = {self.batch_size * ranks}; lower batch_size or add prompts"
            )

    def _reserve(self) -> int:
        rollout = getattr(self._module(), "rollout_config", None)
        configured = getattr(rollout, "max_new_tokens", 64)
        return int(configured if self.max_new_tokens is None else self.max_new_tokens)

    def _collator(self) -> Callable[[Any], Any]:
        return prompts.collate_prompts
