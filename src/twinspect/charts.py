"""Charts as inline SVG strings: no plotting library, no script, colours by CSS class (light and dark).

Every chart carries its title and a description in words, so that a screen reader tells what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

_WIDTH, _LEFT, _END, _TOP, _BOTTOM = 640, 64, 624, 12, 44  # of the picture, the plot's sides, room above and below
_PLOT, _ROW = 300, 78  # heights in pixels: of a line chart, of one group of a histogram
_CAPTION = 14  # room above the rows for the threshold's words
_BINS, _MOST_POINTS = 48, 400
_LONG_TAIL = 8.0  # medians, and 1.5 thresholds, beyond which all values share the last bar: good images stay visible
COLOURS = 5  # classes s0 to s4 of the template


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over two axes from 0 to 1, and the line of guessing (ROC); at most five lines."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]]  # x and y of the points, by name
    marks: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # single points, by name

    def svg(self) -> str:
        """The chart as an ``svg`` element."""
        foot = _TOP + _PLOT
        x, y = Axis(0.0, 1.0, _LEFT, _END), Axis(0.0, 1.0, foot, _TOP)
        parts = [*_x_axis(x, self.x_label, foot), _path("axis", f"M{_LEFT} {foot}V{_TOP}")]
        for value in y.ticks():
            at = y.place(value)
            parts += [_path("grid", f"M{_LEFT} {at:.1f}H{_END}"), _text(_LEFT - 8, at + 4, f"{value:g}", "end")]
        middle = (foot + _TOP) / 2
        parts.append(f'<g transform="rotate(-90 16 {middle})">{_text(16, middle, self.y_label, kind="label")}</g>')
        parts.append(_path("guess", _points(x, y, (0.0, 1.0), (0.0, 1.0))))
        for place, (name, (xs, ys)) in enumerate(self.lines.items()):
            kind, left = f"line s{place % COLOURS}", _LEFT + place * (_END - _LEFT) / len(self.lines)
            parts += [_path(kind, _points(x, y, xs, ys)), _path(kind, f"M{left:.1f} {foot + 58}h26")]
            parts.append(_text(left + 32, foot + 62, name, "start"))
        words = f"Line chart of {self.y_label} over {self.x_label}: {', '.join(self.lines)}."
        for name, (at_x, at_y) in self.marks.items():
            words += f" {name} at {at_x:.3g}, {at_y:.3g}."
            left, top = x.place(at_x), y.place(at_y)
            parts.append(f'<circle class="mark" cx="{left:.1f}" cy="{top:.1f}" r="5"/>')
            inside = 10 if left < _WIDTH / 2 else -10
            parts.append(_text(left + inside, top + 18, name, "start" if inside > 0 else "end", "label"))
        return _svg(self.title, words, parts, foot + 72)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Shares of groups (at most five) of finite values over one common axis, one row each."""

    title: str
    x_label: str
    groups: Mapping[str, ArrayLike]
    threshold: float | None = None  # a vertical line through all of them

    def svg(self) -> str:
        """The chart as an ``svg`` element."""
        groups = {name: np.asarray(values, np.float64) for name, values in self.groups.items()}
        axis, cut = self._axis(np.concatenate(list(groups.values())))
        start = _TOP if self.threshold is None else _TOP + _CAPTION
        bottom = start + _ROW * len(groups)
        parts = _x_axis(axis, self.x_label + (", the last bar: this and more" if cut else ""), bottom)
        for place, (name, values) in enumerate(groups.items()):
            top = start + _ROW * place
            parts += [_path("axis", f"M{_LEFT} {top + _ROW - 6}H{_END}"), _bars(axis, values, top, place)]
            if len(groups) > 1:  # one alone is named by the heading
                parts.append(_text(_END, top + 14, name, "end", "label"))
        medians = (f"{name}: median {np.median(v):.3g} of {len(v)}" for name, v in groups.items() if len(v))
        words = f"Histogram of {self.x_label} by kind. {'; '.join(medians)}."
        if self.threshold is not None:
            x, named = axis.place(self.threshold), f"threshold {self.threshold:.3g}"
            parts.append(_path("threshold", f"M{x:.1f} {start}V{bottom}"))
            parts.append(_text(x, _TOP + 8, named, "start" if x < _WIDTH / 2 else "end"))
            words += f" {named.capitalize()}."
        return _svg(self.title, words, parts, bottom + _BOTTOM)

    def _axis(self, values: NDArray[np.float64]) -> tuple[Axis, bool]:
        """The axis, and whether it ends before the highest value."""
        shown = np.append(values, [0.0, 0.0 if self.threshold is None else self.threshold])
        low, high, middle = float(shown.min()), float(shown.max()), float(np.median(np.abs(shown)))
        limit = max(_LONG_TAIL * middle, 1.5 * (self.threshold or 0.0))
        cut = 0.0 < limit < high
        high = limit if cut else high
        return Axis(low, high if high > low else low + 1.0, _LEFT, _END), cut


@dataclass(frozen=True, slots=True)
class Axis:
    """Values to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        """Pixel of a value; what lies outside the axis is drawn at its end."""
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values to write at the axis."""
        raw = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def _points(x: Axis, y: Axis, xs: ArrayLike, ys: ArrayLike) -> str:
    """A line through the points, or through some hundreds of them: more would only make the file larger."""
    points = np.column_stack([np.asarray(xs, np.float64), np.asarray(ys, np.float64)])
    some = points[np.linspace(0, len(points) - 1, min(len(points), _MOST_POINTS)).round().astype(int)]
    return "M" + "L".join(f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in some.tolist())


def _bars(axis: Axis, values: NDArray[np.float64], top: float, place: int) -> str:
    counts, edges = np.histogram(np.minimum(values, axis.high), _BINS, (axis.low, axis.high))
    base, room, x = top + _ROW - 6, _ROW - 24, [axis.place(edge) for edge in edges]
    heights = base - room * counts / max(int(counts.max()), 1)
    bars = "".join(
        f"M{left:.1f} {base:.1f}V{height:.1f}H{right:.1f}V{base:.1f}Z"
        for height, left, right in zip(heights, x[:-1], x[1:], strict=True)
        if height < base
    )
    return _path(f"bar s{place % COLOURS}", bars)


def _x_axis(axis: Axis, label: str, y: float) -> list[str]:
    parts = [_path("axis", f"M{_LEFT} {y:.1f}H{_END}"), _text((_LEFT + _END) / 2, y + 36, label, kind="label")]
    for value in axis.ticks():
        at = axis.place(value)
        parts += [_path("grid", f"M{at:.1f} {_TOP}V{y:.1f}"), _text(at, y + 16, f"{value:g}")]
    return parts


def _path(kind: str, points: str) -> str:
    return f'<path class="{kind}" d="{points}"/>'


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:g}" text-anchor="{anchor}"{of_kind}>{escape(words)}</text>'


def _svg(title: str, words: str, parts: Sequence[str], height: float) -> str:
    """All texts from outside are escaped here and in `_text`."""
    label = escape(f"{title}. {words}")
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
