from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_hybrid.errors import DataError
from lightning_hybrid.report import Comparison, draw_comparison, write_report

HOSTILE = '</p><script>alert("1")</script><img src=x onerror="alert(2)"> & $title ${tiles} \x00'


class Page(HTMLParser):
    """Tags with their attributes, and all text that is shown."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def names(self):
        return {tag for tag, _ in self.tags}


@pytest.fixture
def picture(tmp_path):
    draw_comparison([0.0, 1.0], [1.0, 2.0], tmp_path / "scores.png")
    return tmp_path / "scores.png"


def report(tmp_path, **changes):
    arguments = {"title": "run", "headline": {}, "curves": None, "samples": [], "config": None}
    return write_report(tmp_path / "report" / "report.html", **arguments | changes)


def test_hostile_texts_are_shown_and_not_obeyed(tmp_path):
    sample = Comparison(HOSTILE, HOSTILE, HOSTILE, 0.0, 1.0)
    page = Page(
        report(tmp_path, title=HOSTILE, headline={HOSTILE: HOSTILE}, samples=[sample], config={HOSTILE: HOSTILE})
    )
    assert page.names().isdisjoint({"script", "img"})
    assert page.text.count('<script>alert("1")</script>') == 7  # twice the title, twice the tile, the sample
    assert page.text.count('<script>alert(\\"1\\")</script>') == 2  # the configuration is JSON
    assert page.text.count("$title ${tiles}") == 9
    assert page.open == []


def test_every_figure_is_on_the_page(tmp_path, picture):
    samples = [
        Comparison("one", "worse", "better", -1.25, 2.5),
        Comparison("two", "better", "worse", 0.125, -0.5),
        Comparison("three", "as", " ", 0.75, 0.7501),
    ]
    headline = {"score before": "−0.125", "score after": "0.917"}
    config = {"algorithm": {"kl_coef": 0.05}, "output_dir": Path("runs/é")}
    path = report(
        tmp_path, title="A run", headline=headline, curves=picture, samples=samples, config=config, scores=picture
    )
    text = Page(path).text
    shown = ["A run", *headline, *headline.values(), "score -1.250", "score 2.500", "▲ +3.750", "▼ -0.625", "= +0.000"]
    assert [item for item in [*shown, "no text", '"kl_coef": 0.05', '"output_dir": "runs/é"'] if item not in text] == []


def test_changes_are_marked_by_their_sign(tmp_path):
    samples = [Comparison("p", "b", "a", 0.0, after) for after in (1.0, -1.0, 0.0, float("nan"))]
    rows = [
        attributes["class"]
        for tag, attributes in Page(report(tmp_path, samples=samples)).tags
        if "class" in attributes and tag == "tr"
    ]
    assert rows == ["up", "down", "same", "same"]


def test_pictures_are_embedded_and_nothing_is_requested(tmp_path, picture):
    path = report(tmp_path, curves=picture, scores=picture)
    page = Page(path)
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == [
        picture.read_bytes()
    ] * 2
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert page.names().isdisjoint({"link", "script", "iframe"})
    assert not re.search(r"https?:|url\(|@import", path.read_text(encoding="utf-8"))


def test_parts_that_were_not_given_are_not_there(tmp_path):
    assert page_sections(report(tmp_path)) == 0
    assert page_sections(report(tmp_path, config={})) == 1


def page_sections(path):
    return sum(tag == "section" for tag, _ in Page(path).tags)


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    path = report(tmp_path, samples=[Comparison("half \ud83d", "b", "a", 0.0, 1.0)])
    assert "half &#55357;" in path.read_text(encoding="utf-8")


def test_a_picture_that_is_missing_or_none_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no picture at .*gone\.png for 'Learning curves'"):
        report(tmp_path, curves=tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("GIF89a")
    with pytest.raises(DataError, match=r"text\.png, for 'Scores before and after', is not a PNG: .*GIF89a"):
        report(tmp_path, scores=tmp_path / "text.png")
