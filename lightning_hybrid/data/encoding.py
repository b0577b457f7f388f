"""Prompts, answers and conversations to token ids, with a mask of what is to be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_hybrid.data.checking import Problems, remark, report_lost_characters
from lightning_hybrid.data.conversation import Text, Turn
from lightning_hybrid.data.templates import Chat, Segment, SystemTurns, TemplateRefusal, Turns, as_turns
from lightning_hybrid.data.tokenizing import encode_segments, encode_texts, with_bos, with_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedText:
    """Token ids, and for each whether it is to be learned; both empty where there is no answer.

    Example:
        ``EncodedText([1, 40, 41, 50, 2], [False, False, False, True, True])``: BOS, two tokens of prompt, one of
        answer, EOS.
    """

    ids: list[int]
    learned: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    def begin(self, length: int | None) -> EncodedText:
        """The first ``length`` tokens; all of them for None."""
        return EncodedText(self.ids[:length], self.learned[:length])

    def end(self, length: int | None, bos: int | None) -> EncodedText:
        """The last ``length`` tokens, keeping a BOS in front; all of them for None."""
        if length is None or len(self) <= length:
            return self
        if self.ids[0] == bos and length > 1:
            cut = len(self) - length + 1
            return EncodedText([bos, *self.ids[cut:]], [False, *self.learned[cut:]])
        return EncodedText(self.ids[len(self) - length :], self.learned[len(self) - length :])


NOTHING = EncodedText([], [])


@dataclass(frozen=True)
class AnswerEncoder:
    """How prompts with answers become token ids.

    Plain prompt and answer are tokenised apart and joined, as a sampled answer is joined to its prompt; BOS and EOS
    come around them. Turns pass through the chat template, which decides about BOS; EOS is added where the template
    ends the last answer with no special token.

    Attributes:
        tokenizer: Its tokens; special tokens are added here or by the template, not by it.
        add_eos: End answers with EOS.
        bos: Begin plain texts with BOS, where the tokenizer has one.
        chat: Make turns of plain prompts and answers too.
        system: See :class:`~lightning_hybrid.data.templates.Chat`.
    """

    tokenizer: PreTrainedTokenizerBase
    add_eos: bool = True
    bos: bool = True
    chat: bool = False
    system: SystemTurns = "keep"

    def answers(self, asked: Sequence[tuple[Text, str]], where: Sequence[str], problems: Problems) -> list[EncodedText]:
        """Encode one answer for each prompt; only the answer is learned.

        Args:
            asked: Prompts (empty where the answer is a whole text) and answers.
            where: ``file:line`` of each.
            problems: Where refusals by the template are noted.

        Returns:
            As many; empty for an empty answer and where a problem was noted.
        """
        in_turns = [index for index, (prompt, _) in enumerate(asked) if self._is_chat(prompt)]
        chats = [
            (*as_turns(asked[i][0]), Turn("assistant", asked[i][1])) if asked[i][1].strip() else () for i in in_turns
        ]
        encoded = dict(zip(in_turns, self._chats(chats, [where[i] for i in in_turns], problems, True), strict=True))
        plain = [index for index in range(len(asked)) if index not in encoded]
        texts = [(str(asked[i][0]), asked[i][1]) for i in plain]
        encoded |= dict(zip(plain, self._plain(texts, problems.source), strict=True))
        return [encoded[index] for index in range(len(asked))]

    def dialogues(self, turns: Sequence[Turns], where: Sequence[str], problems: Problems) -> list[EncodedText]:
        """Encode conversations, of which every answer is learned; see :meth:`answers`."""
        return self._chats(turns, where, problems, False)

    def prompts(
        self, texts: Sequence[Text], where: Sequence[str], problems: Problems
    ) -> tuple[list[list[int]], list[str]]:
        """Encode what is to be answered, up to where the answer begins.

        Returns:
            Token ids of each, and the text that they stand for; empty where the text is, or a problem was noted.
        """
        chat = Chat(self.tokenizer, self.system)
        turns = {i: as_turns(text) for i, text in enumerate(texts) if text and self._is_chat(text)}
        rendered = self._rendered(chat, [*turns.values()], [where[i] for i in turns], problems, chat.prompt)
        ids = [sum(pieces, []) for pieces in self._pieces(rendered, problems.source)]
        encoded = {i: (ids[n], _shown(rendered[n], self.tokenizer.bos_token)) for n, i in enumerate(turns)}
        plain = [index for index in range(len(texts)) if index not in encoded]
        own = [str(texts[index] or "") for index in plain]
        tokens = encode_texts(self.tokenizer, own)
        report_lost_characters(self.tokenizer, own, tokens, problems.source)
        for index, text, row in zip(plain, own, tokens, strict=True):
            encoded[index] = (with_bos(self.tokenizer, row) if self.bos and row else row, text)
        return [encoded[i][0] for i in range(len(texts))], [encoded[i][1] for i in range(len(texts))]

    def _is_chat(self, prompt: Text) -> bool:
        return not isinstance(prompt, str) or (self.chat and prompt != "")

    def _plain(self, texts: Sequence[tuple[str, str]], source: str) -> list[EncodedText]:
        both = [text for pair in texts for text in pair]
        tokens = encode_texts(self.tokenizer, both)
        report_lost_characters(self.tokenizer, both, tokens, source)
        return [self._join(prompt, answer) for prompt, answer in zip(tokens[::2], tokens[1::2], strict=True)]

    def _join(self, prompt: list[int], answer: list[int]) -> EncodedText:
        if not answer:
            return NOTHING
        ids = [*prompt, *answer]
        ids = with_bos(self.tokenizer, ids) if self.bos else ids
        asked = len(ids) - len(answer)
        if not prompt and self.bos and ids[0] == self.tokenizer.bos_token_id:
            asked = 1  # a whole text that brings its BOS along
        ids = with_eos(self.tokenizer, ids) if self.add_eos else ids
        return EncodedText(ids, [False] * asked + [True] * (len(ids) - asked))

    def _chats(
        self, turns: Sequence[Turns], where: Sequence[str], problems: Problems, last_only: bool
    ) -> list[EncodedText]:
        chat = Chat(self.tokenizer, self.system)

        def answered(turns: Turns) -> list[Segment]:
            return chat.answered(turns, last_only=last_only)

        rendered = self._rendered(chat, turns, where, problems, answered)
        pieces = self._pieces(rendered, problems.source)
        return [self._with_end(chat, *both) for both in zip(rendered, pieces, strict=True)]

    def _rendered(
        self,
        chat: Chat,
        turns: Sequence[Turns],
        where: Sequence[str],
        problems: Problems,
        render: Callable[[Turns], list[Segment]],
    ) -> list[list[Segment]]:
        """Segments of each conversation; none for an empty one and where the template refuses, which is noted."""
        rendered: list[list[Segment]] = []
        remarks: Counter[str] = Counter()
        for row, place in zip(turns, where, strict=True):
            segments: list[Segment] = []
            if row:
                chat.require_template(place)
            try:
                segments = render(row) if row else []
            except TemplateRefusal as refusal:
                problems.add(place, str(refusal))
            role = chat.leaves_out(row, segments) if segments else None
            if role:
                remarks[f"the chat template leaves out or changes the words of a turn of the role {role}"] += 1
            rendered.append(segments)
        remark(remarks, len(turns), problems.source)
        return rendered

    def _pieces(self, rendered: Sequence[Sequence[Segment]], source: str) -> list[list[list[int]]]:
        texts = [[segment.text for segment in segments] for segments in rendered]
        pieces = encode_segments(self.tokenizer, texts)
        report_lost_characters(self.tokenizer, sum(texts, []), sum(pieces, []), source)
        return pieces

    def _with_end(self, chat: Chat, segments: Sequence[Segment], pieces: Sequence[list[int]]) -> EncodedText:
        if not segments:
            return NOTHING
        ids = sum(pieces, [])
        learned = [x.learned for x, piece in zip(segments, pieces, strict=True) for _ in piece]
        if self.add_eos and not chat.ends(segments[-1].text):
            ids = with_eos(self.tokenizer, ids)
        return EncodedText(ids, learned + [True] * (len(ids) - len(learned)))


def _shown(segments: Sequence[Segment], bos: str | None) -> str:
    """The text of a prompt, less the BOS that a template begins it with."""
    text = "".join(segment.text for segment in segments)
    return text.removeprefix(bos) if bos else text
