"""What data modules of prompts and answers share: chat templates, and batches of like length."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, get_args

from lightning_hybrid.data.balancing import LikeLengths, lengths_of
from lightning_hybrid.data.checking import Dropped
from lightning_hybrid.data.datamodules.arguments import CommonArguments, check_choice
from lightning_hybrid.data.datamodules.base import TextDataModule
from lightning_hybrid.data.dealing import DealtOrder
from lightning_hybrid.data.encoding import AnswerEncoder
from lightning_hybrid.data.reading import Paths
from lightning_hybrid.data.splitting import Identified
from lightning_hybrid.data.templates import SystemTurns, use_template
from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sized

    from transformers import PreTrainedTokenizerBase

Example = TypeVar("Example", bound=Identified)


class ChatArguments(CommonArguments, total=False):
    """The common arguments, and those of :class:`ChatDataModule`."""

    template: str | None
    chat: bool
    system: SystemTurns
    bos: bool


class AnswerArguments(ChatArguments, total=False):
    """The arguments of :class:`ChatDataModule`, and those of :class:`AnswerDataModule`."""

    add_eos: bool
    balance: bool


class ChatDataModule(TextDataModule[Example]):
    """Rows that may be conversations, which a chat template makes text of.

    Args:
        path: As all common arguments: see `InstructionDataModule`.
        template: Name of a shipped chat template (``chatml``, ``plain``) or of a jinja file, which the tokenizer then
            keeps; ``None`` for the tokenizer's own.
        chat: Make one user turn of each plain prompt too, and one assistant turn of its answer.
        system: ``keep`` gives the template system turns as they are; ``merge`` puts a first system turn in front of
            the user's first words, for templates that refuse the role.
        bos: Begin plain texts with BOS, where the tokenizer has one; of conversations the template decides.
    """

    def __init__(
        self,
        path: Paths,
        *,
        template: str | None = None,
        chat: bool = False,
        system: SystemTurns = "keep",
        bos: bool = True,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(path, **common)
        check_choice("system", system, get_args(SystemTurns))
        self.template = template
        self.chat = chat
        self.system: SystemTurns = system
        self.bos = bos
        self._has_template = False

    def _tokens(self) -> PreTrainedTokenizerBase:
        tokenizer = super()._tokens()
        if self.template is not None and not self._has_template:
            use_template(tokenizer, self.template)
            self._has_template = True
        return tokenizer

    def _answers(self, *, add_eos: bool = True) -> AnswerEncoder:
        return AnswerEncoder(self._tokens(), add_eos, self.bos, self.chat, self.system)

    def _count_dropped(self, source: str, examples: Sized) -> Dropped:
        self.dropped.append(Dropped(source, len(examples)))
        return self.dropped[-1]

    def _shape(self) -> dict[str, Any]:
        template = str(self._tokens().chat_template or "")
        return super()._shape() | {"chat_template": hashlib.sha256(template.encode()).hexdigest() if template else None}


class AnswerDataModule(ChatDataModule[Example]):
    """Rows with answers that are learned.

    Args:
        path: As all common arguments: see `InstructionDataModule`.
        add_eos: End answers with EOS; those of conversations where the template ends them with no special token.
        balance: Train on batches of texts of like length, in an order drawn anew in each epoch: less padding, and
            ranks that take equally long.
    """

    def __init__(
        self, path: Paths, *, add_eos: bool = True, balance: bool = False, **common: Unpack[ChatArguments]
    ) -> None:
        super().__init__(path, **common)
        if balance and self.mix is not None:
            raise ConfigError("balance and mix both decide the order of training: unset one of them")
        self.add_eos = add_eos
        self.balance = balance

    def _dataset(self, examples: Any, source: str, *, training: bool) -> Any:
        dataset = super()._dataset(examples, source, training=training)
        if self.balance:
            refuse_row_groups(dataset, "balance")
        return dataset

    def order(self, dataset: Any) -> DealtOrder:
        """The order of training, and this rank's share of it."""
        if not self.balance:
            return super().order(dataset)
        return LikeLengths(lengths_of(dataset), self.batch_size, self.seed, self._epoch, *self._ranks())


def refuse_row_groups(dataset: Any, setting: str) -> None:
    """Raise where a setting puts rows together that lie in different row groups, each of which is read as a whole.

    Raises:
        ConfigError: names the setting, and the fix.
    """
    if len(getattr(dataset, "blocks", ())) > 1:
        raise ConfigError(
            f"{setting} puts rows from all over a file together, and a Parquet file that is streamed gives them row "
            f"group by row group: unset {setting} or streaming, or write the rows as arrow or jsonl"
        )
