"""Draw the figures of docs/concepts.md, from the library's own functions: no model, no data, the same every time.

python docs/images/concepts.py docs/images
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from twinspect.commands.diagnose import cutpaste, mixup
from twinspect.decide.decision import conformal_threshold
from twinspect.report import Axis

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from painting import part

SIDE, GAP, TEXT = 150, 10, 24
_BOX, _ARROW = "#eef4f8", "#51606e"
_LEFT, _RIGHT, _TOP, _FOOT = 64, 624, 12, 312  # pixels of a plot's sides
_COLOURS = ("#0b6aa8", "#c04e00", "#0a7f5c", "#8a3b8f")
_STYLE = """
svg { background: #fff; font-family: sans-serif; }
text { fill: #57606a; font-size: 12px; text-anchor: middle; }
.label { fill: #1b1f24; font-size: 13px; }
.axis { stroke: #c9ced6; fill: none; } .grid { stroke: #e4e7ec; fill: none; }
.line { fill: none; stroke-width: 2.25; stroke-linejoin: round; }
.left { text-anchor: start; } .right { text-anchor: end; }
"""


def students() -> str:
    """Image, teacher, the two students beside the statistics of good images, and where they meet."""
    boxes = (
        (10, 115, 80, 50, "image", ""),
        (125, 115, 95, 50, "teacher", "frozen"),
        (265, 15, 175, 55, "local student", "rebuilds every patch"),
        (265, 112, 175, 55, "statistics", "of good images"),
        (265, 210, 175, 55, "semantic student", "rebuilds the whole"),
        (495, 15, 150, 55, "map", "where it is unusual"),
        (495, 90, 150, 45, "score_local", ""),
        (495, 210, 150, 55, "score_semantic", ""),
        (700, 115, 100, 50, "score", "Noisy-OR"),
    )
    arrows = (
        (90, 140, 125, 140), (220, 130, 265, 55), (220, 140, 265, 140), (220, 150, 265, 225), (440, 50, 495, 105),
        (440, 125, 495, 55), (440, 140, 495, 115), (440, 155, 495, 222), (440, 240, 495, 240), (645, 115, 700, 132),
        (645, 230, 700, 155),
    )  # fmt: skip
    parts = [
        f'<path d="M{a} {b}L{c} {d}" stroke="{_ARROW}" stroke-width="2" marker-end="url(#a)"/>'
        for a, b, c, d in arrows
    ]
    for x, y, width, height, name, note in boxes:
        place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
        parts.append(f'<rect {place} rx="8" fill="{_BOX}" stroke="{_ARROW}"/>')
        middle, line = x + width / 2, y + height / 2 + (-3 if note else 5)
        parts.append(f'<text x="{middle}" y="{line}" class="label">{escape(name)}</text>')
        parts.append(f'<text x="{middle}" y="{line + 17}">{escape(note)}</text>')
    head = (
        f'<marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{_ARROW}"/></marker>'
    )
    return f'<svg viewBox="0 0 810 280" role="img" aria-label="The two students.">{head}{"".join(parts)}</svg>'


def noisy_or() -> str:
    """The joint probability over one student's, for four values of the other's."""
    x = np.linspace(0, 1, 101)
    lines = {f"local {p:g}": (x, 1 - (1 - p) * (1 - x)) for p in (0.0, 0.3, 0.6, 0.9)}
    return plot("probability of the semantic student", "joint probability", lines)


def calibration() -> str:
    """How many of the next good images are called bad, for three numbers of images behind the threshold."""
    rng = np.random.default_rng(0)
    rates = {}
    for count, budget in ((49, 0.02), (99, 0.01), (999, 0.01)):
        scores = rng.gamma(3.0, size=(2000, count))
        found = [conformal_threshold(row, budget).value for row in scores]
        # The exact share of the next good images at or above each threshold: the tail of the gamma distribution.
        tails = [float(np.exp(-t) * (1 + t + t * t / 2)) for t in found]
        rates[f"{100 * budget:g} % from {count} images (mean {100 * np.mean(tails):.2f} %)"] = 100 * np.array(tails)
    edges = np.linspace(0.0, max(rate.max() for rate in rates.values()), 61)
    steps = {name: 100 * np.histogram(rate, edges)[0] / len(rate) for name, rate in rates.items()}
    lines = {name: (edges.repeat(2)[1:-1], step.repeat(2)) for name, step in steps.items()}
    return plot("good images called bad, percent", "share of the calibrations, percent", lines)


def plot(x_label: str, y_label: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Lines over two axes that begin at 0, named below."""
    x, y = (Axis(0.0, float(max(line[side].max() for line in lines.values()))) for side in (0, 1))
    parts = []
    for value in x.ticks():
        at = f"{_LEFT + (_RIGHT - _LEFT) * x.place(value) / 100:.1f}"
        parts.append(f'<path class="grid" d="M{at} {_TOP}V{_FOOT}"/><text x="{at}" y="{_FOOT + 16}">{value:g}</text>')
    for value in y.ticks():
        at = _FOOT - (_FOOT - _TOP) * y.place(value) / 100
        grid = f'<path class="grid" d="M{_LEFT} {at:.1f}H{_RIGHT}"/>'
        parts.append(f'{grid}<text class="right" x="{_LEFT - 8}" y="{at + 4:.1f}">{value:g}</text>')
    middle = (_TOP + _FOOT) / 2
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_FOOT}H{_RIGHT}"/>')
    parts.append(f'<text class="label" x="{(_LEFT + _RIGHT) / 2}" y="{_FOOT + 36}">{x_label}</text>')
    parts.append(f'<text class="label" transform="rotate(-90 16 {middle})" x="16" y="{middle}">{y_label}</text>')
    for place, ((name, (xs, ys)), colour) in enumerate(zip(lines.items(), _COLOURS, strict=False)):
        points = (
            f"{_LEFT + (_RIGHT - _LEFT) * x.place(a) / 100:.1f} {_FOOT - (_FOOT - _TOP) * y.place(b) / 100:.1f}"
            for a, b in zip(xs, ys, strict=True)
        )
        stroke, low = f'class="line" stroke="{colour}"', _FOOT + 58 + 18 * place
        parts.append(f'<path {stroke} d="M{"L".join(points)}"/><path {stroke} d="M{_LEFT} {low}h26"/>')
        parts.append(f'<text class="left" x="{_LEFT + 32}" y="{low + 4}">{escape(name)}</text>')
    words, height = escape(f"{y_label} over {x_label}: {', '.join(lines)}"), _FOOT + 58 + 18 * len(lines)
    return f'<svg viewBox="0 0 640 {height}" role="img" aria-label="{words}">{"".join(parts)}</svg>'


def interference(target: Path) -> None:
    """Two good images, and what is made of them to ask a model whether one class hides in the other."""
    rng = np.random.default_rng(3)
    one, other = part(0, rng, SIDE), part(1, rng, SIDE)
    shown = {
        "a good image": one, "another class": other, "Mixup": mixup(one, other, rng)[0],
        "CutPaste": cutpaste(one, other, rng)[0],
    }  # fmt: skip
    picture = Image.new("RGB", (len(shown) * (SIDE + GAP) + GAP, SIDE + TEXT + 2 * GAP), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for place, (name, pixels) in enumerate(shown.items()):
        left = GAP + place * (SIDE + GAP)
        pen.text((left, GAP), name, "black", font)
        picture.paste(Image.fromarray(pixels), (left, GAP + TEXT))
    picture.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


def standing(svg: str) -> str:
    """A figure as a file of its own."""
    named = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return named.replace(">", f"><style>{_STYLE}</style>", 1) + "\n"


FIGURES = {"students": students, "noisy-or": noisy_or, "calibration": calibration}


def main(folder: Path) -> None:
    """Write all figures."""
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(standing(draw()), encoding="utf-8")
    interference(folder / "interference.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
