"""Charts as inline SVG strings: no plotting library, no script, colours by CSS class (light and dark).

Every chart carries its title and a description in words, so that a screen reader tells what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_WIDTH, _LEFT, _END, _TOP, _BOTTOM = 640, 64, 624, 12, 44  # of the picture, the plot's sides, room above and below
_PLOT, _ROW = 300, 78  # heights in pixels: of a line chart, of one group of a histogram
_CAPTION = 14  # room above the rows for the threshold's words
_BINS = 48
_MOST_POINTS = 400
_LONG_TAIL = 20.0  # largest over median score, beyond which a linear axis hides the good images
COLOURS = 5  # classes s0 to s4 of the template


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name and points."""

    name: str
    x: ArrayLike
    y: ArrayLike


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over two axes from 0 to 1, and the line of guessing (ROC); at most five lines.

    Attributes:
        marks: (name, x, y) of single points, such as the one a threshold works at.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    marks: tuple[tuple[str, float, float], ...] = ()

    @property
    def description(self) -> str:
        """What the chart shows, in words."""
        names = ", ".join(s.name for s in self.series)
        points = "".join(f" {name} at {x:.3g}, {y:.3g}." for name, x, y in self.marks)
        return f"Line chart of {self.y_label} over {self.x_label}: {names}.{points}"

    def svg(self) -> str:
        """The chart as an ``svg`` element."""
        x, y, bottom = Axis(0.0, 1.0, _LEFT, _END), Axis(0.0, 1.0, _TOP + _PLOT, _TOP), _TOP + _PLOT + _BOTTOM
        guess = np.array([0.0, 1.0])
        parts = [*_x_axis(x, self.x_label, _TOP + _PLOT), *_y_axis(y, self.y_label)]
        parts.append(_path("guess", _points(x, y, guess, guess)))
        room = (_END - _LEFT) / max(len(self.series), 1)
        for place, one in enumerate(self.series):
            points = _thin(np.asarray(one.x, np.float64), np.asarray(one.y, np.float64))
            parts.append(_path(f"line s{place % COLOURS}", _points(x, y, *points)))
            at = _LEFT + room * place
            parts.append(_path(f"line s{place % COLOURS}", f"M{at:.1f} {bottom + 14}H{at + 26:.1f}"))
            parts.append(_text(at + 32, bottom + 18, one.name, "start"))
        for name, at_x, at_y in self.marks:
            left, top = x.place(at_x), y.place(at_y)
            parts.append(f'<circle class="mark" cx="{left:.1f}" cy="{top:.1f}" r="5"/>')
            inside = 10 if left < _WIDTH / 2 else -10
            parts.append(_text(left + inside, top + 18, name, "start" if inside > 0 else "end", "label"))
        return _svg(self, parts, bottom + 28)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Shares of groups (at most five) of finite values over one common axis, one row each.

    The threshold is a vertical line through all of them; None draws none.
    """

    title: str
    x_label: str
    groups: Mapping[str, ArrayLike]
    threshold: float | None = None

    @property
    def description(self) -> str:
        """What the chart shows, in words."""
        words = [
            f"{name}: median {np.median(values):.3g} of {len(values)}"
            for name, values in ((n, np.asarray(v, np.float64)) for n, v in self.groups.items())
            if len(values)
        ]
        end = "" if self.threshold is None else f" Threshold {self.threshold:.3g}."
        return f"Histogram of {self.x_label} by kind. {'; '.join(words)}.{end}"

    def svg(self) -> str:
        """The chart as an ``svg`` element."""
        groups = {name: np.asarray(values, np.float64) for name, values in self.groups.items()}
        limits = [] if self.threshold is None else [np.array([self.threshold])]
        axis = _score_axis(np.concatenate([*groups.values(), *limits]))
        start = _TOP if self.threshold is None else _TOP + _CAPTION
        bottom = start + _ROW * len(groups)
        parts = _x_axis(axis, self.x_label + (", compressed scale" if axis.unit else ""), bottom)
        for place, (name, values) in enumerate(groups.items()):
            top = start + _ROW * place
            parts += [_path("axis", f"M{_LEFT} {top + _ROW - 6}H{_END}"), _bars(axis, values, top, place)]
            if len(groups) > 1:  # one alone is named by the heading
                parts.append(_text(_END, top + 14, name, "end", "label"))
        if self.threshold is not None:
            x = axis.place(self.threshold)
            parts.append(_path("threshold", f"M{x:.1f} {start}V{bottom}"))
            words = f"threshold {self.threshold:.3g}"
            parts.append(_text(x, _TOP + 8, words, "start" if x < _WIDTH / 2 else "end"))
        return _svg(self, parts, bottom + _BOTTOM)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to pixels; ``unit`` > 0 compresses values beyond it (asinh), 0 is linear."""

    low: float
    high: float
    start: float
    stop: float
    unit: float = 0.0

    def place(self, value: float) -> float:
        """Pixel of a value; what lies outside the axis is drawn at its end."""
        low, high, at = (self._scaled(v) for v in (self.low, self.high, value))
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.stop - self.start)

    def edges(self, count: int) -> Floats:
        """``count`` + 1 bin edges, equally far apart in pixels."""
        steps = np.linspace(self._scaled(self.low), self._scaled(self.high), count + 1)
        return np.sinh(steps) * self.unit if self.unit else steps

    def ticks(self) -> list[float]:
        """Round values to write at the axis."""
        if not self.unit:
            return _round_steps(self.low, self.high)
        decades = range(math.floor(math.log10(self.unit)), math.ceil(math.log10(max(self.high, self.unit))) + 1)
        values = [0.0, *(10.0**k for k in decades), -self.unit]
        return sorted(v for v in values if self.low <= v <= self.high)

    def _scaled(self, value: float) -> float:
        return math.asinh(value / self.unit) if self.unit else value


def _score_axis(values: Floats) -> Axis:
    """Linear, unless a long tail would press the good images into one bin."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    low = min(low, 0.0)
    high = high if high > low else low + 1.0
    middle = float(np.median(np.abs(values))) if len(values) else 0.0
    unit = middle if middle > 0 and high > _LONG_TAIL * middle else 0.0
    return Axis(low, high, _LEFT, _END, unit)


def _round_steps(low: float, high: float) -> list[float]:
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Drop points in the middle of straight runs (ROC curves are stairs), then every so many."""
    bends = np.ones(len(x), dtype=bool)
    if len(x) > 2:
        before, after = (np.diff(x)[:-1], np.diff(y)[:-1]), (np.diff(x)[1:], np.diff(y)[1:])
        bends[1:-1] = np.abs(before[0] * after[1] - before[1] * after[0]) > 1e-12
    at = np.flatnonzero(bends)
    if len(at) > _MOST_POINTS:
        at = at[np.linspace(0, len(at) - 1, _MOST_POINTS).round().astype(int)]
    return x[at], y[at]


def _points(x: Axis, y: Axis, xs: Floats, ys: Floats) -> str:
    return "M" + "L".join(f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in zip(xs, ys, strict=True))


def _bars(axis: Axis, values: Floats, top: float, place: int) -> str:
    counts, edges = np.histogram(values, axis.edges(_BINS))
    base, room, x = top + _ROW - 6, _ROW - 24, [axis.place(edge) for edge in edges]
    heights = base - room * counts / max(int(counts.max(initial=0)), 1)
    bars = "".join(
        f"M{left:.1f} {base:.1f}V{height:.1f}H{right:.1f}V{base:.1f}Z"
        for height, left, right in zip(heights, x[:-1], x[1:], strict=True)
        if height < base
    )
    return _path(f"bar s{place % COLOURS}", bars)


def _x_axis(axis: Axis, label: str, y: float) -> list[str]:
    parts, last = [_path("axis", f"M{_LEFT} {y:.1f}H{_END}")], -math.inf
    for value in axis.ticks():
        at = axis.place(value)
        if at - last < 34:  # labels would touch
            continue
        last = at
        parts += [_path("grid", f"M{at:.1f} {_TOP}V{y:.1f}"), _text(at, y + 16, f"{value:g}")]
    return [*parts, _text((_LEFT + _END) / 2, y + 36, label, kind="label")]


def _y_axis(axis: Axis, label: str) -> list[str]:
    parts, middle = [_path("axis", f"M{_LEFT} {axis.start:.1f}V{axis.stop:.1f}")], (axis.start + axis.stop) / 2
    for value in axis.ticks():
        at = axis.place(value)
        parts += [_path("grid", f"M{_LEFT} {at:.1f}H{_END}"), _text(_LEFT - 8, at + 4, f"{value:g}", "end")]
    return [*parts, f'<g transform="rotate(-90 16 {middle})">{_text(16, middle, label, kind="label")}</g>']


def _path(kind: str, points: str) -> str:
    return f'<path class="{kind}" d="{points}"/>'


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:g}" text-anchor="{anchor}"{of_kind}>{escape(words)}</text>'


def _svg(chart: LineChart | Histogram, parts: Sequence[str], height: float) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(chart.title)}. '
    return f'{head}{escape(chart.description)}">{"".join(parts)}</svg>'
