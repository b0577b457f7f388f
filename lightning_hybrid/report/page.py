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
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        tiles=_tiles(headline),
        curves=_picture("curves", "Learning curves", curves),
        scores=_picture("scores", "Scores before and after", scores),
        samples=_samples(samples),
        config=_config(config),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Texts from JSON files may hold half a surrogate pair, which UTF-8 cannot carry.
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _tiles(headline: Mapping[str, str]) -> str:
    tiles = [f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in headline.items()]
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _picture(key: str, name: str, path: Path | None) -> str:
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
    return f'<section id="{key}"><h2>{name}</h2><div class="picture" tabindex="0">{image}</div></section>'


def _samples(samples: Sequence[Comparison]) -> str:
    if not samples:
        return ""
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Prompt", "Before", "After", "Change"))
    rows = "".join(_row(sample) for sample in samples)
    return f"<section><h2>Samples</h2><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></section>"


def _row(sample: Comparison) -> str:
    change = round(sample.score_after - sample.score_before, 3)
    sign = "up" if change > 0 else "down" if change < 0 else "same"
    arrow = {"up": "▲", "down": "▼", "same": "="}[sign]  # colour alone would not tell everyone
    return (
        f'<tr class="{sign}"><td data-label="Prompt"><p dir="auto">{escape(sample.prompt)}</p></td>'
        f"{_response('Before', sample.before, sample.score_before)}"
        f"{_response('After', sample.after, sample.score_after)}"
        f'<td data-label="Change" class="change">{arrow} {change:+.3f}</td></tr>'
    )


def _response(label: str, text: str, score: float) -> str:
    shown = f'<p dir="auto">{escape(text)}</p>' if text.strip() else '<p class="empty">no text</p>'
    return f'<td data-label="{label}" class="{label.lower()}">{shown}<span class="score">score {score:.3f}</span></td>'


def _config(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return ""
    text = json.dumps(dict(config), indent=2, ensure_ascii=False, default=str)
    return f"<section><details><summary>Configuration</summary><pre>{escape(text)}</pre></details></section>"
