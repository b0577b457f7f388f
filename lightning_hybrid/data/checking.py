"""Finding what is wrong with data and tokenizers, and saying all of it at once, before any training."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_hybrid.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOGGER = logging.getLogger("lightning_hybrid")
SHOWN_PROBLEMS = 20
SHOWN_EXAMPLES = 10


class Tally:
    """What is dropped, lost and remarked while rows are read bit by bit, to be said once for all of them.

    Args:
        source: What is read, for messages.
        losses: Count lost characters too, which takes as long as tokenising; not where they were counted before.
    """

    def __init__(self, source: str, *, losses: bool = True) -> None:
        self.losses = losses
        self.dropped = Dropped(source, 0)
        self.lost: Counter[str] = Counter()
        self.conversations = 0
        self.remarks: Counter[str] = Counter()
        self.notices: dict[str, None] = {}

    def add(self, other: Tally) -> None:
        """Take in what another one holds."""
        self.dropped.total += other.dropped.total
        self.dropped.reasons.update(other.dropped.reasons)
        self.lost.update(other.lost)
        self.conversations += other.conversations
        self.remarks.update(other.remarks)
        self.notices |= other.notices

    def report(self) -> None:
        """Log everything.

        Raises:
            DataError: If no row is left.
        """
        for message in self.notices:
            notice(message)
        remark(self.remarks, self.conversations, self.dropped.source)
        _report_lost(self.lost, self.dropped.source)
        self.dropped.report()


_GATHERING: ContextVar[Tally | None] = ContextVar("tally of rows that are read bit by bit", default=None)


@contextmanager
def gathered(tally: Tally) -> Iterator[None]:
    """Within it, what this file would log goes to ``tally``, and nothing is raised where no row of a bit is left."""
    token = _GATHERING.set(tally)
    try:
        yield
    finally:
        _GATHERING.reset(token)


def notice(message: str) -> None:
    """Log a one-line warning, on rank 0 only: every rank reads the same data."""
    tally = _GATHERING.get()
    if tally is not None:
        tally.notices[message] = None
    elif not getattr(rank_zero_only, "rank", 0):
        LOGGER.warning(message)


def remark(remarks: Counter[str], conversations: int, source: str) -> None:
    """Log a one-line warning for each remark, with the number of the conversations that it was made on."""
    tally = _GATHERING.get()
    if tally is not None:
        tally.remarks.update(remarks)
        tally.conversations += conversations
        return
    for what, count in remarks.items():
        notice(f"{count:,} of {conversations:,} conversations of {source}: {what}")


def say(message: str) -> None:
    """Log one line that is no warning, on rank 0 only."""
    if not getattr(rank_zero_only, "rank", 0):
        LOGGER.info(message)


class Problems:
    """Everything found wrong, kept until it can be reported together.

    Args:
        source: What is being checked, such as the file names; it opens the message.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        """Keep one problem: ``where`` is ``file:line``, ``what`` names the value and the fix."""
        self.found.append(f"{where}: {what}")

    def raise_if_any(self) -> None:
        """Raise one error that counts all problems and shows the first 20.

        Raises:
            DataError: If there is any problem.
        """
        if not self.found:
            return
        lines = self.found[:SHOWN_PROBLEMS]
        if len(self.found) > SHOWN_PROBLEMS:
            lines = [*lines, f"... and {len(self.found) - SHOWN_PROBLEMS} more"]
        count = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''}"
        raise DataError("\n  ".join([f"{count} in {self.source}:", *lines]))


class Dropped:
    """A count of the rows that are left out, by reason, so that nothing disappears in silence.

    Args:
        source: The file names, for the message.
        total: Number of rows before anything was dropped.
    """

    def __init__(self, source: str, total: int) -> None:
        self.source = source
        self.total = total
        self.reasons: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Count one dropped row."""
        self.reasons[reason] += 1

    def report(self) -> None:
        """Log the counts, in one line.

        Raises:
            DataError: If no row is left.
        """
        tally = _GATHERING.get()
        if tally is not None:
            tally.dropped.total += self.total
            tally.dropped.reasons.update(self.reasons)
            return
        count = sum(self.reasons.values())
        reasons = "; ".join(f"{number:,} {reason}" for reason, number in self.reasons.items())
        if count == self.total:
            raise DataError(f"nothing is left of the {self.total:,} rows of {self.source}: {reasons or 'no rows'}")
        if count:
            notice(f"{count:,} of {self.total:,} rows of {self.source} dropped: {reasons}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that every token id of the tokenizer has a row in the model's embedding.

    Args:
        tokenizer: The tokenizer, with its added and special tokens.
        vocab_size: Number of rows of the model's embedding.

    Raises:
        DataError: If an id is ``vocab_size`` or more; names the tokens.
    """
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
    if not beyond:
        return
    examples = ", ".join(f"{token!r} = {index}" for index, token in beyond[:SHOWN_EXAMPLES])
    raise DataError(
        f"{len(beyond):,} tokens of the tokenizer have ids beyond the model's embedding of {vocab_size:,} rows: "
        f"{examples}. Use the tokenizer that belongs to the model, or resize the embedding."
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to fill padding with: the pad token, else EOS, else 0.

    Which one it is does not matter, and it may be a token that also occurs in texts: masks decide what counts.
    """
    for name in ("pad_token_id", "eos_token_id"):
        index = getattr(tokenizer, name)
        if index is not None:
            return int(index)
    return 0


def lost_characters(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> Counter[str]:
    """Count the characters that do not come back when the tokens of a text are decoded.

    A tokenizer without a token for a character drops it or puts the unknown token in its place. White space and
    changes of case or of Unicode form are no loss.

    Args:
        tokenizer: The tokenizer that encoded the texts.
        texts: The texts.
        token_ids: The token ids of each text, without special tokens.

    Returns:
        How many of each character were lost, over all texts.
    """
    lost: Counter[str] = Counter()
    unknown = tokenizer.unk_token_id  # asked for once: the tokenizer looks it up anew each time
    for text, ids in zip(texts, token_ids, strict=True):
        known = [index for index in ids if index != unknown]
        lost.update(_lost(text, str(tokenizer.decode(known))))
    return lost


def report_lost_characters(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], token_ids: Sequence[Sequence[int]], source: str
) -> None:
    """Log how many characters the tokenizer loses, with up to 10 examples; nothing when it loses none."""
    tally = _GATHERING.get()
    if tally is None:
        _report_lost(lost_characters(tokenizer, texts, token_ids), source)
    elif tally.losses:
        tally.lost.update(lost_characters(tokenizer, texts, token_ids))


def _report_lost(lost: Counter[str], source: str) -> None:
    if not lost:
        return
    examples = ", ".join(f"{character!r} ×{count:,}" for character, count in lost.most_common(SHOWN_EXAMPLES))
    more = ", ..." if len(lost) > SHOWN_EXAMPLES else ""
    notice(
        f"the tokenizer has no token for {len(lost):,} of the characters in {source} and loses "
        f"{lost.total():,} of them: {examples}{more}"
    )


def _lost(text: str, decoded: str) -> Counter[str]:
    missing = Counter(_fold(text)) - Counter(_fold(decoded))
    if not missing:
        return Counter()
    gone = Counter(text) - Counter(decoded)
    return Counter({character: n for character, n in gone.items() if any(part in missing for part in _fold(character))})


def _fold(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
