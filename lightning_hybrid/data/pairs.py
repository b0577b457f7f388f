"""Where the prompt of two answers ends that are written out with it."""

from __future__ import annotations

from lightning_hybrid.data.conversation import Turn

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def is_transcript(text: str) -> bool:
    r"""Whether a text is a dialogue written as ``\n\nHuman: ... \n\nAssistant: ...`` (Bai et al. 2022)."""
    return text.startswith(HUMAN) and ASSISTANT in text


def part_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Part two texts into the prompt that they share and what each adds to it.

    Transcripts are parted after the last ``\n\nAssistant:`` that they share, other texts before the last white space
    that they share, so that no word is torn. Neither answer is empty, unless its text is; equal texts share no prompt
    unless they are transcripts.

    Returns:
        The prompt, and the rest of ``chosen`` and of ``rejected``.

    Example:
        ``part_texts("It is cold today.", "It is cold.") == ("It is", " cold today.", " cold.")``
    """
    if is_transcript(chosen) and is_transcript(rejected):
        end = _shared(chosen, rejected)
        marker = chosen.rfind(ASSISTANT, 0, end)
        cut = marker + len(ASSISTANT) if marker >= 0 else 0
    else:
        longest = min(len(chosen.rstrip()), len(rejected.rstrip()))
        end = 0 if chosen == rejected else min(_shared(chosen, rejected), max(longest - 1, 0))
        cut = next((place for place in range(end - 1, 0, -1) if chosen[place].isspace()), 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def part_turns(
    chosen: tuple[Turn, ...], rejected: tuple[Turn, ...]
) -> tuple[tuple[Turn, ...], tuple[Turn, ...], tuple[Turn, ...]]:
    """Part two conversations into the turns that they share and those that each adds, which is one at least."""
    longest = min(len(chosen), len(rejected)) - 1
    cut = 0
    while cut < longest and chosen[cut] == rejected[cut]:
        cut += 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _shared(one: str, other: str) -> int:
    """Number of characters with which both texts begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
