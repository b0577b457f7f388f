from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from lightning_hybrid.report.charts import Line, duration, histogram, line_chart, number, share_bar

STEPS = list(range(200))


def drawing(chart):
    """The SVG of a figure, as a tree."""
    return ElementTree.fromstring(chart[chart.index("<svg") : chart.index("</svg>") + 6])


def points(path):
    return [tuple(map(float, point.split())) for point in re.findall(r"[ML]([\d.-]+ [\d.-]+)", path)]


def curves(chart):
    """Points of each curve that is not the raw line behind another, by its colour."""
    paths = [path.attrib for path in drawing(chart).iter("path")]
    return {path["class"]: points(path["d"]) for path in paths if path["class"] in ("c0", "c1", "c2")}


def test_the_highest_value_is_the_highest_point_and_the_last_step_the_rightmost():
    drawn = curves(line_chart("t", "u", "step", [Line("a", [0, 1, 2], [1.0, 5.0, 3.0])]))["c0"]
    assert [x for x, _ in drawn] == sorted(x for x, _ in drawn)
    assert min(range(3), key=lambda index: drawn[index][1]) == 1
    (_, low), (_, high), (_, middle) = drawn
    assert middle == pytest.approx((low + high) / 2, abs=0.2)


def test_every_point_lies_inside_the_drawing():
    spiky = [math.sin(step) * 10 ** (step % 7) for step in STEPS]
    chart = line_chart("t", "u", "step", [Line("a", STEPS, spiky), Line("b", STEPS, STEPS)])
    _, _, width, height = map(float, drawing(chart).attrib["viewBox"].split())
    for x, y in [point for line in curves(chart).values() for point in line]:
        assert 0 <= x <= width
        assert 0 <= y <= height


def test_a_spike_in_a_long_line_is_not_lost():
    steps = list(range(20_000))
    values = [0.0] * 20_000
    values[12_345] = 7.0
    chart = line_chart("t", "u", "step", [Line("a", steps, values)])
    raw = next(points(path.attrib["d"]) for path in drawing(chart).iter("path") if path.attrib["class"] == "c0 raw")
    assert len(raw) < 700
    assert min(y for _, y in raw) == pytest.approx(8, abs=0.1)  # the top of the drawing
    assert len(chart) < 30_000


def test_what_is_not_finite_leaves_a_gap_and_is_counted():
    chart = line_chart("t", "u", "step", [Line("a", [0, 1, 2, 3], [1.0, math.nan, 2.0, math.inf])])
    assert "2 values that are not finite are left out" in chart
    path = next(path.attrib["d"] for path in drawing(chart).iter("path") if path.attrib["class"] == "c0")
    assert path.count("M") == 2


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-12, 1e12])
def test_a_single_point_has_axes_around_it(value):
    chart = line_chart("t", "u", "step", [Line("a", [7], [value])])
    assert len(list(drawing(chart).iter("circle"))) == 1
    assert "nan" not in chart


def test_nothing_finite_is_said_rather_than_drawn():
    chart = line_chart("t", "u", "step", [Line("a", [1], [math.nan])])
    assert "no finite value was logged" in chart
    assert "<svg" not in chart


def test_names_cannot_become_markup():
    hostile = '"><script>alert(1)</script>'
    chart = line_chart(hostile, hostile, hostile, [Line(hostile, [0, 1], [0.0, 1.0])])
    chart += histogram(hostile, hostile, {hostile: [1.0]}) + share_bar({hostile: 1.0})
    assert "<script>" not in chart
    ElementTree.fromstring(f"<div>{chart}</div>")


def test_the_bars_of_a_set_are_its_shares():
    chart = histogram("length", "tokens", {"all": [1, 1, 1, 3]})
    bars = [(float(bar.attrib["x"]), float(bar.attrib["height"])) for bar in drawing(chart).iter("rect")]
    assert len(bars) == 2
    assert bars[0][1] / bars[1][1] == pytest.approx(3.0, rel=0.01)
    assert "mean 1.50, n=4" in chart


@pytest.mark.parametrize(
    ("numbers", "shares"),
    [
        ([0, 0, 0, 1], [0.75, 0.25]),
        ([-1, 0, 0, 1], [0.25, 0.5, 0.25]),
        (list(range(24)), [1 / 24] * 24),
        (list(range(48)), [1 / 24] * 24),  # two numbers to a bar
        (list(range(25)), [2 / 25] * 12 + [1 / 25]),
    ],
)
def test_each_whole_number_has_a_bar_of_its_own_where_there_is_room(numbers, shares):
    chart = histogram("length", "tokens", {"all": numbers})
    heights = [float(bar.attrib["height"]) for bar in drawing(chart).iter("rect")]
    assert [height / sum(heights) for height in heights] == pytest.approx(shares, abs=0.002)


def test_a_histogram_of_nothing_finite_is_not_there():
    assert histogram("t", "u", {"a": [], "b": [math.nan]}) == ""


def test_parts_of_the_bar_are_shares_of_the_time():
    bar = share_bar({"rollout": 30.0, "update": 90.0})
    assert "flex:0.2500" in bar
    assert "25%, 30.0 s" in bar
    assert "75%, 1 min 30 s" in bar
    assert share_bar({}) == share_bar({"rollout": 0.0}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.123"), (5.0, "5.00"), (12.34, "12.3"), (123.456, "123.5"), (1234567.0, "1,234,567")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.25, "1.2 s"), (61, "1 min 1 s"), (3599.9, "1 h 0 min"), (7300, "2 h 1 min")]
)
def test_durations_are_words(seconds, text):
    assert duration(seconds) == text
