"""Charts as SVG inside a page: a few kilobytes each, sharp at every width, in the page's own light and dark colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24
_SMOOTH_FROM = 50  # points; fewer can be seen one by one
_MARK_UP_TO = 20  # points; a line of one point would not be seen at all
_MOST_POINTS = 300  # of a line: a pixel each
_BINS = 24
COLORS = 7
"""Colours that a page has for lines, in the order of the pictures' ``CYCLE``: the classes ``c0`` and so on."""


@dataclass(frozen=True)
class Line:
    """Values over steps; what is not finite leaves a gap."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class _Frame:
    """Where numbers stand on the drawing."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(title: str, unit: str, counted: str, lines: Sequence[Line]) -> str:
    """A figure with a line for each series; long ones get a moving average, with the raw line behind it.

    Args:
        title: of the figure.
        unit: of the values.
        counted: what the steps are, such as ``"iteration"``.
        lines: at least one.

    Returns:
        HTML, every text escaped.
    """
    finite = [v for line in lines for v in line.values if math.isfinite(v)]
    if not finite:
        return _figure(title, unit, '<p class="note">no finite value was logged</p>', "")
    steps = [step for line in lines for step in line.steps]
    frame = _Frame(*_apart(min(steps), max(steps)), *_apart(min(finite), max(finite)))
    drawn = "".join(_draw(line, color % COLORS, frame) for color, line in enumerate(lines))
    lost = sum(len(line.values) for line in lines) - len(finite)
    note = f'<p class="note">{lost} values that are not finite are left out</p>' if lost else ""
    names = [(line.name, _last(line)) for line in lines]
    label = f"{title}, {unit}: " + "; ".join(f"{name} ends at {value}" for name, value in names)
    svg = _svg(label, _axes(frame, counted) + drawn)
    return _figure(title, unit, svg, _legend(names) + note)


def histogram(title: str, unit: str, samples: Mapping[str, Sequence[float]]) -> str:
    """A figure with the share of each set of numbers in the same bins.

    Args:
        title: of the figure.
        unit: of the numbers.
        samples: the numbers by what they are called; those that are not finite are left out.

    Returns:
        HTML, every text escaped; "" if there is no finite number.
    """
    import numpy as np

    finite = {name: [v for v in values if math.isfinite(v)] for name, values in samples.items()}
    finite = {name: values for name, values in finite.items() if values}
    together = [v for values in finite.values() for v in values]
    if not together:
        return ""
    edges = _edges(together)
    shares = {name: np.histogram(values, edges)[0] / len(values) for name, values in finite.items()}
    frame = _Frame(edges[0], edges[-1], 0.0, max(float(share.max()) for share in shares.values()) * 1.05)
    bars = "".join(_bars(share.tolist(), edges, color, frame) for color, share in enumerate(shares.values()))
    names = [(name, f"mean {number(sum(v) / len(v))}, n={len(v)}") for name, v in finite.items()]
    label = f"{title}, {unit}: " + "; ".join(f"{name} {value}" for name, value in names)
    return _figure(title, f"{unit}, share of responses", _svg(label, _axes(frame, "") + bars), _legend(names))


def _edges(numbers: Sequence[float]) -> list[float]:
    """Borders of bins; where all numbers are whole, each bin is around as many of them as the next."""
    import numpy as np

    low, high = min(numbers), max(numbers)
    if low == high or any(v != int(v) for v in numbers):
        return list(map(float, np.linspace(*_apart(low, high), _BINS + 1)))
    width = float(math.ceil((high - low + 1) / _BINS))
    return list(map(float, np.arange(low - 0.5, high + width + 0.5, width)))


def share_bar(seconds: Mapping[str, float]) -> str:
    """One bar whose parts are as wide as their share of all seconds, and a legend that says both."""
    total = sum(seconds.values())
    if not total > 0:
        return ""
    parts = [
        f'<span class="b{color % COLORS}" style="flex:{value / total:.4f}"></span>'
        for color, value in enumerate(seconds.values())
    ]
    names = [(name, f"{value / total:.0%}, {duration(value)}") for name, value in seconds.items()]
    label = escape("; ".join(f"{name} {value}" for name, value in names))
    return f'<div class="shares" role="img" aria-label="{label}">{"".join(parts)}</div>{_legend(names)}'


def number(value: float) -> str:
    """A number with three or four digits that matter."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:#.3g}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# ---- parts of a drawing ----------------------------------------------------------------------------------------------


def _figure(title: str, unit: str, body: str, foot: str) -> str:
    head = f"<figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span></figcaption>"
    return f'<figure class="chart">{head}{body}{foot}</figure>'


def _svg(label: str, body: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _legend(names: Sequence[tuple[str, str]]) -> str:
    entries = "".join(
        f'<li><i class="b{color % COLORS}"></i>{escape(name)} <em>{escape(value)}</em></li>'
        for color, (name, value) in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def _last(line: Line) -> str:
    return "–" if not line.values else number(next((v for v in reversed(line.values) if math.isfinite(v)), math.nan))


def _apart(low: float, high: float) -> tuple[float, float]:
    """Both, or numbers around them where they are one."""
    if high > low:
        return low, high
    room = abs(low) * 0.05 or 0.5
    return low - room, high + room


def _draw(line: Line, color: int, frame: _Frame) -> str:
    from lightning_hybrid.report.curves import smooth

    points = list(zip(line.steps, line.values, strict=True))
    if len(points) <= _SMOOTH_FROM:
        dots = "".join(
            f'<circle class="b{color}" cx="{frame.x(s):.1f}" cy="{frame.y(v):.1f}" r="2.6"/>'
            for s, v in points
            if len(points) <= _MARK_UP_TO and math.isfinite(v)
        )
        return _path(points, f"c{color}", frame) + dots
    average = list(zip(line.steps, smooth(list(line.values)), strict=True))
    return _path(points, f"c{color} raw", frame) + _path(average, f"c{color}", frame)


def _path(points: Sequence[tuple[int, float]], css: str, frame: _Frame) -> str:
    steps, command = [], "M"
    for step, value in _thinned(points):
        if math.isfinite(value):
            steps.append(f"{command}{frame.x(step):.1f} {frame.y(value):.1f}")
        command = "L" if math.isfinite(value) else "M"
    return f'<path class="{css}" d="{"".join(steps)}"/>'


def _thinned(points: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """The lowest and the highest point of each of many pieces, so that no spike is lost."""
    size = max(1, math.ceil(2 * len(points) / _MOST_POINTS))
    for begin in range(0, len(points), size):
        piece = points[begin : begin + size]
        finite = [point for point in piece if math.isfinite(point[1])]
        if len(piece) <= 2 or not finite:
            yield from piece[:2]
        else:
            ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
            yield from sorted(ends)


def _bars(shares: Sequence[float], edges: Sequence[float], color: int, frame: _Frame) -> str:
    ground = frame.y(0.0)
    return "".join(
        f'<rect class="b{color}" x="{frame.x(a) + 0.5:.1f}" y="{frame.y(share):.1f}" '
        f'width="{max(frame.x(b) - frame.x(a) - 1, 0.5):.1f}" height="{ground - frame.y(share):.1f}"/>'
        for share, a, b in zip(shares, edges[:-1], edges[1:], strict=True)
        if share > 0
    )


def _axes(frame: _Frame, counted: str) -> str:
    rows = "".join(
        f'<path class="grid" d="M{_LEFT} {frame.y(v):.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{frame.y(v) + 4:.1f}" text-anchor="end">{_tick(v)}</text>'
        for v in _ticks(frame.bottom, frame.top, 4)
    )
    columns = "".join(
        f'<text x="{frame.x(v):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{_tick(v)}</text>'
        for v in _ticks(frame.left, frame.right, 5)
        if not counted or frame.x(v) < _WIDTH - _RIGHT - 24 - 6 * len(counted)  # room for what is counted
    )
    name = f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end" class="unit">{escape(counted)}</text>'
    return rows + columns + name


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two others, no more than ``most`` + 1."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and letter != "k"):
            return f"{value / size:.4g}{letter}"
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"
