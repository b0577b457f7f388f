"""The built-in task: a small language with a true preference, so that every stage can run and be judged offline.

A prompt says who goes where ("mia visits the market ."), a response notes 2 to 5 things there ("the soup is warm .
the lemonade is dark ."). Warm soup is good and warm lemonade is bad: the preference needs context. The place decides
which things are likely to be seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hybrid.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("mia", "tom", "ada", "ben", "eva", "leo", "ida", "max")
VERBS = ("visits", "leaves", "enters", "sees")
ADJECTIVES = ("cold", "warm", "soft", "hard", "loud", "quiet", "bright", "dark")
# For each thing, the adjectives that are good and those that are bad; the other four are neutral.
TASTE = {
    "soup": (("warm", "dark"), ("cold", "hard")),
    "lemonade": (("cold", "bright"), ("warm", "dark")),
    "bread": (("warm", "soft"), ("cold", "hard")),
    "ice": (("cold", "hard"), ("warm", "soft")),
    "pillow": (("soft", "cold"), ("hard", "warm")),
    "ladder": (("hard", "bright"), ("soft", "dark")),
    "party": (("loud", "bright"), ("quiet", "dark")),
    "lesson": (("quiet", "bright"), ("loud", "dark")),
    "cinema": (("dark", "loud"), ("bright", "quiet")),
    "engine": (("quiet", "warm"), ("loud", "cold")),
    "bedroom": (("dark", "quiet"), ("bright", "loud")),
    "garden": (("bright", "warm"), ("dark", "cold")),
}
NOUNS = tuple(TASTE)
SEEN_AT = {
    "market": ("soup", "lemonade", "bread", "ice"),
    "school": ("lesson", "ladder", "garden", "bread"),
    "hotel": ("bedroom", "pillow", "soup", "party"),
    "harbour": ("engine", "ice", "ladder", "lemonade"),
    "farm": ("garden", "ladder", "bread", "engine"),
    "museum": ("cinema", "lesson", "ice", "engine"),
    "village": ("garden", "party", "soup", "cinema"),
    "hospital": ("bedroom", "pillow", "lesson", "soup"),
    "theatre": ("cinema", "party", "lemonade", "engine"),
    "station": ("engine", "pillow", "bread", "cinema"),
}
PLACES = tuple(SEEN_AT)
BEST_GOLD = 1.0
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class TaskSizes:
    """How many rows each file gets; there are 320 prompts, and those that are not held out are the training prompts."""

    sft: int = 2000
    preferences: int = 8000
    heldout: int = 64


@dataclass(frozen=True)
class TaskFiles:
    """Where the task was written: four data files and a tokenizer folder."""

    sft: Path
    preferences: Path
    prompts: Path
    heldout: Path
    tokenizer: Path


def gold_score(response: str) -> float:
    """Return the true preference for a response: the mean over its clauses, in [-1, 1].

    A clause "the <thing> is <adjective> ." counts 1 where the adjective suits the thing, -1 where it does not, and 0
    otherwise. A clause of any other form, also one without its full stop, counts -1, and so does an empty response.

    Example:
        ``gold_score("the soup is warm . the lemonade is warm .") == 0.0``
    """
    *clauses, rest = " ".join(response.split()).split(".")
    if rest.strip():
        clauses.append(f"{rest} (unfinished)")
    if not clauses:
        return -1.0
    return sum(_clause_score(clause) for clause in clauses) / len(clauses)


def task_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the gold score of each response, as a reward function does; the prompts do not matter."""
    return [gold_score(response) for response in responses]


def sample_response(prompt: str, draw: random.Random) -> str:
    """Draw a response as the training texts have them: 2 to 5 clauses, good and bad alike, so that the mean gold is 0.

    Args:
        prompt: A prompt of the grammar; its place decides on three of four things.
        draw: The source of chance.
    """
    likely = SEEN_AT[prompt.split()[-2]]
    nouns = [draw.choice(likely if draw.random() < 0.75 else NOUNS) for _ in range(draw.randint(2, 5))]
    return " ".join(f"the {noun} is {_sample_adjective(noun, draw)} ." for noun in nouns)


def all_prompts() -> list[str]:
    """Return the 320 prompts of the grammar."""
    return [f"{name} {verb} the {place} ." for name in NAMES for verb in VERBS for place in PLACES]


def write_task(folder: str | Path, seed: int = 0, sizes: TaskSizes | None = None) -> TaskFiles:
    """Write the task's data and tokenizer; the same seed and sizes give the same files.

    Args:
        folder: Where to write; made if it does not exist.
        seed: Of all that is drawn.
        sizes: How much of it.

    Returns:
        The paths: ``sft.jsonl`` (``prompt``, ``response``), ``preferences.jsonl`` (``prompt``, ``chosen``,
        ``rejected``: the best and the worst of two or four by gold score), ``prompts.jsonl`` and ``heldout.jsonl``
        (``prompt``, none in both, and no held-out one in any training file), and the folder ``tokenizer``.

    Raises:
        DataError: If ``sizes.heldout`` leaves no prompt to train on.
    """
    sizes = sizes or TaskSizes()
    draw = random.Random(seed)
    prompts = all_prompts()
    if not 0 < sizes.heldout < len(prompts):
        raise DataError(f"heldout is {sizes.heldout}, but the task has {len(prompts)} prompts: 1 to {len(prompts) - 1}")
    draw.shuffle(prompts)
    heldout, training = prompts[: sizes.heldout], prompts[sizes.heldout :]
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save_pretrained(root / "tokenizer")
    return TaskFiles(
        sft=_write(root / "sft.jsonl", _instructions(training, sizes.sft, draw)),
        preferences=_write(root / "preferences.jsonl", _preferences(training, sizes.preferences, draw)),
        prompts=_write(root / "prompts.jsonl", ({"prompt": prompt} for prompt in training)),
        heldout=_write(root / "heldout.jsonl", ({"prompt": prompt} for prompt in heldout)),
        tokenizer=root / "tokenizer",
    )


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token for each word of the grammar; it decodes to exactly what it encoded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS.values(), "the", "is", ".", *NAMES, *VERBS, *PLACES, *NOUNS, *ADJECTIVES]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {**SPECIAL_TOKENS, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=model, **options)


def _clause_score(clause: str) -> float:
    words = clause.split()
    if len(words) != 4 or (words[0], words[2]) != ("the", "is"):
        return -1.0
    noun, adjective = words[1], words[3]
    if noun not in TASTE or adjective not in ADJECTIVES:
        return -1.0
    good, bad = TASTE[noun]
    return float(adjective in good) - float(adjective in bad)


def _sample_adjective(noun: str, draw: random.Random) -> str:
    # Good and bad ones three times as often as neutral ones: 3/8 good, 3/8 bad, 1/4 neutral.
    good, bad = TASTE[noun]
    weights = [3 if adjective in good or adjective in bad else 1 for adjective in ADJECTIVES]
    return draw.choices(ADJECTIVES, weights)[0]


def _instructions(prompts: Sequence[str], count: int, draw: random.Random) -> Iterable[Mapping[str, str]]:
    for _ in range(count):
        prompt = draw.choice(prompts)
        yield {"prompt": prompt, "response": sample_response(prompt, draw)}


def _preferences(prompts: Sequence[str], count: int, draw: random.Random) -> Iterable[Mapping[str, str]]:
    written = 0
    while written < count:
        prompt = draw.choice(prompts)
        # Pairs far apart teach a reward model what matters, close ones how much.
        candidates = draw.choice((2, 4))
        rejected, *_, chosen = sorted((sample_response(prompt, draw) for _ in range(candidates)), key=gold_score)
        if gold_score(rejected) < gold_score(chosen):
            written += 1
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _write(path: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
