"""Pairs of a chosen and a rejected text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Unpack, get_args

from lightning_hybrid.data import preferences, schemas
from lightning_hybrid.data.checking import Problems, pad_id
from lightning_hybrid.data.datamodules.arguments import check_choice, check_positive
from lightning_hybrid.data.datamodules.chatting import AnswerArguments, AnswerDataModule
from lightning_hybrid.data.reading import Paths, Row
from lightning_hybrid.data.recognition import Recogniser
from lightning_hybrid.data.reward_texts import Form, RewardTexts, form_of
from lightning_hybrid.errors import ConfigError, DataError

Pairing = Literal["rows", "labels"]


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
        if pairs is not None and self.mix is not None:
            raise ConfigError("pairs and mix both decide how long an epoch is: unset pairs, or mix")
        self.chosen_key = chosen_key
        self.rejected_key = rejected_key
        self.prompt_key = prompt_key
        self.margin_key = margin_key
        self.pairing: Pairing = pairing
        self.pairs = pairs
        self._validation_texts: list[preferences.LabelledText] = []
        self._forms: set[Form] = set()

    def keep_reward_texts(self) -> None:
        """Note in the tokenizer how texts became token ids, for what a reward model that learned from them scores."""
        self.setup()
        RewardTexts(sorted(self._forms), self.add_eos, self.bos, self.chat, self.system).keep(self._tokens())

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
            self._forms.add("whole")
            return [*preferences.read_labelled(rows, problems)]
        keys = (self.chosen_key, self.rejected_key, self.prompt_key, self.margin_key)

        def by_keys(rows: Sequence[Row]) -> list[preferences.Preference]:
            return preferences.read_preferences(rows, *keys, problems)

        found = schemas.preferences_of(rows, recogniser, by_keys, self.margin_key, problems)
        self._forms |= {form_of(example.prompt, self.chat) for example in found}
        return [*found]

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
