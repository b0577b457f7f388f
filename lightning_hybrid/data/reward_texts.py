"""How the texts that a reward model learns from become token ids; kept with its tokenizer, for what it scores later."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from lightning_hybrid.data.checking import Problems, Tally, gathered
from lightning_hybrid.data.conversation import Text, Turn
from lightning_hybrid.data.encoding import AnswerEncoder
from lightning_hybrid.data.templates import Chat, SystemTurns, TemplateRefusal, Turns, as_turns
from lightning_hybrid.data.tokenizing import encode_segments, encode_texts, with_bos, with_eos
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import end_of_turn_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "reward_texts"  # in tokenizer_config.json
WORDS = "\u241f"  # stands for what the assistant says; no template writes it
Form = Literal["whole", "apart", "turns"]


def form_of(prompt: Text, chat: bool) -> Form:
    """How a prompt and its answer become token ids: as one text, each for itself, or as turns."""
    if not prompt:
        return "whole"
    return "turns" if chat or not isinstance(prompt, str) else "apart"


@dataclass(frozen=True)
class RewardTexts:
    """How prompts and responses become the token ids that a reward model knows.

    Attributes:
        forms: The forms that its texts had. Of one that says nothing, plain texts are taken to have been whole, and a
            tokenizer's chat template to have been used for turns.
        add_eos: See :class:`~lightning_hybrid.data.datamodules.chatting.AnswerDataModule`.
        bos: As ``chat`` and ``system``: see :class:`~lightning_hybrid.data.datamodules.chatting.ChatDataModule`.
    """

    forms: Collection[Form] = ("turns", "whole")
    add_eos: bool = True
    bos: bool = True
    chat: bool = False
    system: SystemTurns = "keep"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RewardTexts:
        """What :meth:`keep` kept.

        Raises:
            ConfigError: If somebody else changed it.
        """
        kept = tokenizer.init_kwargs.get(KEY, {})
        try:
            return cls(**kept)
        except TypeError as error:
            raise ConfigError(
                f"{KEY!r} in tokenizer_config.json of '{tokenizer.name_or_path}' is not what the recipe reward wrote: "
                f"{error}; take it from the model's original folder, or remove it"
            ) from error

    def keep(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write it down in the tokenizer, which takes it along wherever it is saved."""
        tokenizer.init_kwargs[KEY] = asdict(self)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        responses: Sequence[str],
        turns: Sequence[Turns | None],
    ) -> list[list[int]]:
        """Token ids of each prompt with its response.

        Args:
            tokenizer: Of the reward model.
            prompts: As the policy was shown them.
            responses: Each continuing its prompt, without special tokens.
            turns: Of prompts that are conversations.

        Raises:
            DataError: If the chat template refuses a conversation.
        """
        conversations = [self._turns(tokenizer, *each) for each in zip(prompts, turns, strict=True)]
        rows = [*zip(prompts, responses, conversations, strict=True)]
        plain = iter(self._plain(tokenizer, [(prompt, said) for prompt, said, chat in rows if chat is None]))
        asked = {row: (chat, said) for row, (_, said, chat) in enumerate(rows) if chat is not None}
        chats = iter(self._answered(tokenizer, asked) if asked else [])
        return [next(plain if chat is None else chats) for chat in conversations]

    def _turns(self, tokenizer: PreTrainedTokenizerBase, prompt: str, turns: Turns | None) -> Turns | None:
        if "turns" not in self.forms or not tokenizer.chat_template:
            return None
        return as_turns(prompt) if turns is None and self.chat else turns

    def _plain(self, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]]) -> list[list[int]]:
        if "apart" in self.forms:
            # A response is told from its prompt by tokens, as when the policy sampled it.
            encoded = [sum(pieces, []) for pieces in encode_segments(tokenizer, asked)]
        else:
            encoded = encode_texts(tokenizer, [prompt + response for prompt, response in asked])
        begun = [with_bos(tokenizer, ids) if self.bos else ids for ids in encoded]
        return [with_eos(tokenizer, ids) if self.add_eos else ids for ids in begun]

    def _answered(self, tokenizer: PreTrainedTokenizerBase, asked: Mapping[int, tuple[Turns, str]]) -> list[list[int]]:
        encoder = AnswerEncoder(tokenizer, self.add_eos, system=self.system)
        lead = self._lead(tokenizer)
        said = [(turns, response.removeprefix(lead)) for turns, response in asked.values()]
        problems = Problems("what the reward model is to score")
        # Remarks were made in training; here they would be made on every batch.
        with gathered(Tally(problems.source, losses=False)):
            answers = encoder.answers(said, [f"sample {row}" for row in asked], problems)
            problems.raise_if_any()
            pairs = zip(asked.values(), answers, strict=True)
            return [answer.ids or self._unanswered(encoder, turns) for (turns, _), answer in pairs]

    def _unanswered(self, encoder: AnswerEncoder, turns: Turns) -> list[int]:
        """A conversation to which nothing was said, as no training text is."""
        (opened,), _ = encoder.prompts([turns], [""], Problems(""))
        end = end_of_turn_id(encoder.tokenizer)
        if end is not None:
            return [*opened, end]
        return with_eos(encoder.tokenizer, opened) if self.add_eos else opened

    def _lead(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What the template itself writes before the words of an answer, and the policy therefore samples."""
        turns = (Turn("user", WORDS), Turn("assistant", WORDS))
        try:
            return Chat(tokenizer, self.system).answered(turns)[-1].text.partition(WORDS)[0]
        except TemplateRefusal:  # it will refuse the conversations themselves, and their row is then told
            return ""
