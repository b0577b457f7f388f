"""An inspection as text for a terminal, in colours or in brackets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_hybrid.data.encoding import EncodedText
from lightning_hybrid.report.inspection import Inspection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks
_PERCENTILES = (5, 25, 50, 75, 95, 99)
_COLORS = {"learned": "\033[32m", "learned special": "\033[1;32m", "special": "\033[35m", "given": "\033[36m"}
_PLAIN, _BOLD = "\033[0m", "\033[1m"
_BRACKETS = {"learned": ("[", "]"), "learned special": ("[{", "}]"), "special": ("{", "}"), "given": ("", "")}
_KINDS = {
    (False, False): "given",
    (False, True): "special",
    (True, False): "learned",
    (True, True): "learned special",
}
_LEGEND = {
    True: "cyan: given, green: learned; special tokens magenta, or bold green where they are learned",
    False: "[learned], {special token}, [{learned special token}], anything else is given",
}


def render(inspection: Inspection, *, color: bool, sample_tokens: int = 200) -> str:
    """Write down what there is to see.

    Args:
        inspection: The figures and samples.
        color: Mark what is learned with ANSI colours rather than brackets.
        sample_tokens: Tokens that are shown of each sample.
    """
    lines = [*_counts(inspection), "", *_table(inspection), "", *_fit(inspection)]
    if inspection.samples:
        lines += ["", f"{len(inspection.samples)} samples ({_LEGEND[color]})"]
    for number, sample in enumerate(inspection.samples, start=1):
        for name, text in sample.items():
            title = f"--- {number}, {name}: {len(text):,} tokens, {sum(text.learned):,} learned"
            shown = "".join(_marked(inspection.tokenizer, text.begin(sample_tokens), color))
            more = f" ... {len(text) - sample_tokens:,} more" if len(text) > sample_tokens else ""
            lines += ["", f"{_BOLD}{title}{_PLAIN}" if color else title, shown + more]
    return "\n".join(lines)


def _counts(inspection: Inspection) -> Iterator[str]:
    yield f"{inspection.kind}: {inspection.kept:,} rows kept of {sum(inspection.files.values()):,}"
    for name, rows in inspection.files.items():
        yield f"  {name}: {rows:,} rows"
    for reason, count in inspection.dropped.items():
        yield f"  dropped: {count:,} {reason}"
    if inspection.repeated:
        yield f"  repeated: {inspection.repeated:,} rows have the tokens of one before them"
    for line in inspection.said:
        yield f"  {line}"


def _table(inspection: Inspection) -> Iterator[str]:
    """Percentiles of every length."""
    import numpy as np

    names = ["shortest", *(f"{p}%" for p in _PERCENTILES), "longest", "mean"]
    width = max(len("tokens"), *(len(name) for name in inspection.lengths))
    yield f"{'tokens':<{width}}" + "".join(f"{name:>10}" for name in names)
    for name, lengths in inspection.lengths.items():
        figures = [min(lengths), *np.percentile(lengths, _PERCENTILES), max(lengths), np.mean(lengths)]
        yield f"{name:<{width}}" + "".join(f"{figure:>10,.0f}" for figure in figures)


def _fit(inspection: Inspection) -> Iterator[str]:
    limit, reserve = inspection.limit, inspection.reserve
    if limit is None:
        yield "no limit: give data.max_length, or model.path for the model's positions"
    else:
        behind = f" less {reserve:,} new ones" if reserve else ""
        done = {"drop": "dropped", "truncate": "truncated", "error": "an error"}[inspection.too_long]
        share = inspection.beyond / inspection.kept
        yield f"{inspection.beyond:,} rows ({share:.1%}) have more than {limit:,} tokens{behind}: {done} in training"
    if (found := inspection.arrangement) is not None:
        yield f"padding in batches of {found.batch_size}: {found.random:.1%}; with balance=true {found.balanced:.1%}"
        if found.packed is not None:
            yield f"with packing=true {found.packed:.1%} of the rows' room stays empty"


def _marked(tokenizer: PreTrainedTokenizerBase, text: EncodedText, color: bool) -> Iterator[str]:
    """The text, run by run of tokens of one kind."""
    for kind, run in _runs(tokenizer, text):
        before, after = (_COLORS[kind], _PLAIN) if color else _BRACKETS[kind]
        yield f"{before}{_CONTROL.sub(_visible, run)}{after}"


def _visible(match: re.Match[str]) -> str:
    r"""A control character as Python writes it, such as ``\x1b``: a terminal would obey it."""
    return match[0].encode("unicode_escape").decode()


def _runs(tokenizer: PreTrainedTokenizerBase, text: EncodedText) -> Iterator[tuple[str, str]]:
    """Runs of special, learned and given tokens, and the text that each adds to what stands before it."""
    special = {*tokenizer.all_special_ids}
    kinds = [_KINDS[learned, index in special] for index, learned in zip(text.ids, text.learned, strict=True)]
    begin, written = 0, ""
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[begin]:
            continue
        so_far = _decode(tokenizer, text.ids[:end])
        yield kinds[begin], so_far[len(written) :]
        begin, written = end, so_far


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))
