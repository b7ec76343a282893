"""Draw the figures of docs/concepts.md, from the library's own functions: no model, no data, the same every time.

python docs/images/concepts.py docs/images
"""

from __future__ import annotations

import re
import sys
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from twinspect.charts import Histogram, LineChart
from twinspect.data.painting import part
from twinspect.decide.conformal import conformal_threshold
from twinspect.diagnose import cutpaste, mixup

SIDE, GAP, TEXT = 150, 10, 24
_BOX, _ARROW = "#eef4f8", "#51606e"


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
        parts.append(f'<text x="{middle}" y="{line}" text-anchor="middle" class="label">{escape(name)}</text>')
        parts.append(f'<text x="{middle}" y="{line + 17}" text-anchor="middle">{escape(note)}</text>')
    head = (
        f'<marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{_ARROW}"/></marker>'
    )
    return f'<svg viewBox="0 0 810 280" role="img" aria-label="The two students.">{head}{"".join(parts)}</svg>'


def noisy_or() -> str:
    """The joint probability over one student's, for four values of the other's."""
    x = np.linspace(0, 1, 101)
    lines = {f"local {p:g}": (x, 1 - (1 - p) * (1 - x)) for p in (0.0, 0.3, 0.6, 0.9)}
    return LineChart("Noisy-OR", "probability of the semantic student", "joint probability", lines).svg()


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
    return Histogram("Calibration", "good images called bad, percent", rates).svg()


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
    """A chart of a report as a file of its own, with the report's colours."""
    page = files("twinspect").joinpath("report.html").read_text(encoding="utf-8")
    colours = re.search(r":root \{(.*?)\}", page, re.DOTALL)
    rules = re.findall(r"svg [.\w]+ \{[^}]*\}|svg [.\w]+\.s\d \{[^}]*\}", page)
    palette = colours[1].replace("color-scheme: light dark;", "") if colours else ""
    style = f"svg{{{palette} background:#fff; font-family: sans-serif;}} {' '.join(rules)}"
    named = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return named.replace(">", f"><style>{style}</style>", 1) + "\n"


FIGURES = {"students": students, "noisy-or": noisy_or, "calibration": calibration}


def main(folder: Path) -> None:
    """Write all figures."""
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(standing(draw()), encoding="utf-8")
    interference(folder / "interference.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
