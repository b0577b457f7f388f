"""One HTML file that shows a run to people: no script, no request, nothing beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from lightning_hybrid.errors import DataError

_TEMPLATE = Path(__file__).with_name("page.html")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Comparison:
    """A prompt, and how the policy continued it before and after training.

    Attributes:
        prompt: as text.
        before: response of the policy before training.
        after: response of the trained policy.
        score_before: what the reward gave the first.
        score_after: what the reward gave the second.
    """

    prompt: str
    before: str
    after: str
    score_before: float
    score_after: float


def write_report(
    path: str | Path,
    title: str,
    headline: Mapping[str, str],
    curves: Path | None,
    samples: Sequence[Comparison],
    config: Mapping[str, Any] | None,
    scores: Path | None = None,
) -> Path:
    """Write one self-contained HTML file; every text in it is escaped, pictures are embedded.

    Args:
        path: the file to write; its folder is made where it is missing.
        title: of the page.
        headline: the figures that matter most, by what they are called.
        curves: PNG of the learning curves, see :func:`~lightning_hybrid.report.draw_curves`.
        samples: responses before and after.
        config: of the run, shown as JSON.
        scores: PNG of the distributions of scores, see :func:`~lightning_hybrid.report.draw_comparison`.

    Returns:
        ``path``.

    Raises:
        DataError: if a picture is missing or is not a PNG.
    """
    parts = [
        tiles(headline),
        picture("curves", "Learning curves", curves),
        picture("scores", "Scores before and after", scores),
        samples_before_and_after(samples),
        folded("Configuration", None if config is None else as_json(config)),
    ]
    return write_page(path, title, parts)


def write_page(path: str | Path, title: str, parts: Sequence[str]) -> Path:
    """Write a page.

    Args:
        path: the file to write; its folder is made where it is missing.
        title: of the page; escaped here.
        parts: HTML of the page one below the other; "" for one that is not there.

    Returns:
        ``path``.
    """
    body = "\n".join(part for part in parts if part)
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(title=escape(title), body=body)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Texts from JSON files may hold half a surrogate pair, which UTF-8 cannot carry.
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def tiles(headline: Mapping[str, str]) -> str:
    """Figures that are seen first, by what they are called; "" for none."""
    cards = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in headline.items()]
    return f'<dl class="tiles">{"".join(cards)}</dl>' if cards else ""


def section(key: str, name: str, body: str) -> str:
    """A card with a heading; "" for no body."""
    return f'<section id="{key}"><h2>{escape(name)}</h2>{body}</section>' if body else ""


def folded(name: str, body: str | None) -> str:
    """A card that is opened by a click; "" for None."""
    return "" if body is None else f"<section><details><summary>{escape(name)}</summary>{body}</details></section>"


def as_json(values: Mapping[str, Any]) -> str:
    """Values as indented JSON."""
    text = json.dumps(dict(values), indent=2, ensure_ascii=False, default=str)
    return f"<pre>{escape(text)}</pre>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of short values that scrolls on narrow screens."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="values"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(key: str, name: str, path: Path | None) -> str:
    """A card with a PNG; "" for no path.

    Raises:
        DataError: if it is missing or is not a PNG.
    """
    if path is None:
        return ""
    if not path.is_file():
        raise DataError(f"no picture at {path} for {name!r}: draw it first, or pass None")
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise DataError(f"{path}, for {name!r}, is not a PNG: it begins with {content[:8]!r}")
    data = base64.b64encode(content).decode("ascii")
    # The picture scrolls on narrow screens, and people who use the keyboard must be able to reach it.
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return section(key, name, f'<div class="picture" tabindex="0">{image}</div>')


def samples_before_and_after(samples: Sequence[Comparison], title: str = "Samples", key: str = "samples") -> str:
    """A card with two responses to each prompt; "" for none."""
    if not samples:
        return ""
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Prompt", "Before", "After"))
    heads += '<th scope="col" class="change">Change</th>'
    rows = "".join(_row(sample) for sample in samples)
    body = f'<table class="samples"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return section(key, title, body)


def _row(sample: Comparison) -> str:
    change = round(sample.score_after - sample.score_before, 3)
    sign = "up" if change > 0 else "down" if change < 0 else "same"
    arrow = {"up": "▲", "down": "▼", "same": "="}[sign]  # colour alone would not tell everyone
    return (
        f'<tr class="{sign}"><td data-label="Prompt"><p dir="auto">{escape(sample.prompt)}</p></td>'
        f'<td data-label="Before" class="before">{response(sample.before, sample.score_before)}</td>'
        f'<td data-label="After" class="after">{response(sample.after, sample.score_after)}</td>'
        f'<td data-label="Change" class="change">{arrow} {change:+.3f}</td></tr>'
    )


def response(text: str, score: float, after: int | None = None) -> str:
    """What a policy wrote, its score, and after how many steps."""
    shown = f'<p dir="auto">{escape(text)}</p>' if text.strip() else '<p class="empty">no text</p>'
    step = "" if after is None else f", after step {after:,}"
    return f'{shown}<span class="score">score {score:.3f}{step}</span>'
