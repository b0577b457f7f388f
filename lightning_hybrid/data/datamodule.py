"""The three data modules: prompts with responses, preferences, and prompts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Unpack, get_args

from lightning_hybrid.data import instructions, preferences, prompts
from lightning_hybrid.data.base import CommonArguments, Paths, TextDataModule, check_choice, check_positive
from lightning_hybrid.data.checking import Problems, pad_id
from lightning_hybrid.data.reading import Row
from lightning_hybrid.errors import DataError

Pairing = Literal["rows", "labels"]


class InstructionDataModule(TextDataModule[instructions.Instruction]):
    """Prompts with responses, or whole texts, for supervised fine-tuning.

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
        add_eos: End responses with EOS.
        bos: Begin with BOS, where the tokenizer has one.

    Raises:
        ConfigError: If an argument has a value that it cannot have.
    """

    def __init__(
        self,
        path: Paths,
        *,
        prompt_key: str | None = "prompt",
        response_key: str = "response",
        add_eos: bool = True,
        bos: bool = True,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(path, **common)
        self.prompt_key = prompt_key
        self.response_key = response_key
        self.add_eos = add_eos
        self.bos = bos

    def _examples(self, rows: list[Row], problems: Problems) -> list[instructions.Instruction]:
        return instructions.read_instructions(rows, self.prompt_key, self.response_key, problems)

    def _dataset(self, examples: list[instructions.Instruction], source: str, *, training: bool) -> Any:
        return instructions.encode_instructions(
            examples, self._tokens(), self._rule(), source, add_eos=self.add_eos, bos=self.bos
        )

    def _collator(self) -> Callable[[Any], Any]:
        return partial(instructions.collate_instructions, fill=pad_id(self._tokens()))


class PreferenceDataModule(TextDataModule[preferences.Preference | preferences.LabelledText]):
    """Pairs of a chosen and a rejected text, for reward models.

    Batches: ``chosen`` and ``rejected``, each with ``input_ids`` Long[B, T] and ``attention_mask`` Bool[B, T], padded
    on the right, and ``margin`` Float[B] where rows have one. Truncating keeps BOS and the end of a text.

    Args:
        path: As all common arguments: see `InstructionDataModule`.
        chosen_key: Name of the better text in a row.
        rejected_key: Name of the other one.
        prompt_key: Name of the prompt that both answer; ``None`` where the texts contain it.
        margin_key: Name of the number that says by how much; ``None`` where there is none.
        pairing: ``rows``: each row is a pair. ``labels``: rows have ``text`` and ``label``, and a pair is a text of
            label 1 over one of label 0, drawn by seed and epoch.
        pairs: Pairs of one epoch with ``labels``; ``None``: as many as rows.
        add_eos: End both texts with EOS.
        bos: Begin with BOS, where the tokenizer has one.

    Raises:
        ConfigError: If an argument has a value that it cannot have.
    """

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
        add_eos: bool = True,
        bos: bool = True,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(path, **common)
        check_choice("pairing", pairing, get_args(Pairing))
        check_positive("pairs", pairs)
        self.chosen_key = chosen_key
        self.rejected_key = rejected_key
        self.prompt_key = prompt_key
        self.margin_key = margin_key
        self.pairing: Pairing = pairing
        self.pairs = pairs
        self.add_eos = add_eos
        self.bos = bos
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

    def _examples(self, rows: list[Row], problems: Problems) -> list[preferences.Preference | preferences.LabelledText]:
        if self.pairing == "labels":
            return [*preferences.read_labelled(rows, problems)]
        keys = (self.chosen_key, self.rejected_key, self.prompt_key, self.margin_key)
        return [*preferences.read_preferences(rows, *keys, problems)]

    def _dataset(
        self, examples: list[preferences.Preference | preferences.LabelledText], source: str, *, training: bool
    ) -> Any:
        labelled = [example for example in examples if isinstance(example, preferences.LabelledText)]
        if labelled:
            return self._pairs(labelled, source, training=training)
        rows = [example for example in examples if isinstance(example, preferences.Preference)]
        return preferences.encode_preferences(rows, self._encoder(), source)

    def _pairs(
        self, examples: list[preferences.LabelledText], source: str, *, training: bool
    ) -> preferences.PairDataset:
        kept, token_ids = preferences.encode_labelled(examples, self._encoder(), source)
        positive = [ids for example, ids in zip(kept, token_ids, strict=True) if example.positive]
        negative = [ids for example, ids in zip(kept, token_ids, strict=True) if not example.positive]
        if training:
            return preferences.PairDataset(positive, negative, self.pairs or len(kept), self.seed, self._epoch)
        self._validation_texts = kept
        return preferences.PairDataset(positive, negative, len(kept), self.seed)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer is not None else 0

    def _encoder(self) -> preferences.TextEncoder:
        return preferences.TextEncoder(self._tokens(), self._rule(), self.add_eos, self.bos)

    def _collator(self) -> Callable[[Any], Any]:
        return partial(preferences.collate_preferences, fill=pad_id(self._tokens()))


class PromptDataModule(TextDataModule[prompts.Prompt]):
    """Prompts for reinforcement learning; training batches are always full.

    Batches: see `PromptBatch`. Truncating keeps BOS and the end of a prompt.

    Args:
        path: As all common arguments: see `InstructionDataModule`.
        prompt_key: Name of the prompt in a row.
        first_words: Cut each text to its first words; repeated prompts are then dropped, and counted.
        max_new_tokens: Tokens that must fit within ``max_length`` behind each prompt; ``None``: what the module that is
            trained will sample.
        bos: Begin with BOS, where the tokenizer has one.

    Raises:
        ConfigError: If an argument has a value that it cannot have.
    """

    _drop_last = True

    def __init__(
        self,
        path: Paths,
        *,
        prompt_key: str = "prompt",
        first_words: int | None = None,
        max_new_tokens: int | None = None,
        bos: bool = True,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(path, **common)
        check_positive("first_words", first_words)
        check_positive("max_new_tokens", max_new_tokens)
        self.prompt_key = prompt_key
        self.first_words = first_words
        self.max_new_tokens = max_new_tokens
        self.bos = bos

    def _examples(self, rows: list[Row], problems: Problems) -> list[prompts.Prompt]:
        return prompts.read_prompts(rows, self.prompt_key, self.first_words, problems)

    def _dataset(self, examples: list[prompts.Prompt], source: str, *, training: bool) -> Any:
        encoded = prompts.encode_prompts(
            examples, self._tokens(), self._rule(reserve=self._reserve()), source, bos=self.bos
        )
        ranks = self.trainer.world_size if self.trainer is not None else 1
        if training and len(encoded) < self.batch_size * ranks:
            raise DataError(
                f"{source} gives {len(encoded):,} prompts, fewer than one batch: batch_size {self.batch_size} × "
                f"{ranks} ranks = {self.batch_size * ranks}; lower batch_size or add prompts"
            )
        return encoded

    def _reserve(self) -> int:
        rollout = getattr(self._module(), "rollout_config", None)
        configured = getattr(rollout, "max_new_tokens", 64)
        return int(configured if self.max_new_tokens is None else self.max_new_tokens)

    def _collator(self) -> Callable[[Any], Any]:
        return prompts.collate_prompts
