"""One self-contained HTML file: text, tables, charts, cases. Opens offline, asks nobody for anything.

Build `Section`s of `Table`, `LineChart`, `Histogram` and `Cases`; `write_report` does the rest. Pictures are
small JPEGs inside the file and share one budget, so a report stays under five megabytes whatever is put in.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twinspect._version import __version__
from twinspect.charts import Histogram, LineChart
from twinspect.files import write_text
from twinspect.inference.result import Result, colourise

THUMB = 224  # longest side in pixels of a picture, when there are few
_PICTURE_BYTES = 4_000_000  # base64 characters of all pictures of a report together
_STOPS = 7


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns; the first cell names its row, and floats are written with four decimals."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]
    note: str = ""

    @classmethod
    def of(cls, title: str, rows: Iterable[Mapping[str, Any]], note: str = "") -> Table:
        """A column for every key that a row has a value for; a dash where a row has none, or None."""
        listed = list(rows)
        keys = dict.fromkeys(key for row in listed for key in row)
        columns = tuple(key for key in keys if any(row.get(key) is not None for row in listed))
        body = (tuple("-" if row.get(key) is None else row[key] for key in columns) for row in listed)
        return cls(title, columns, tuple(body), note)

    def cells(self) -> list[list[str]]:
        """Columns and rows as they are written."""
        rows = (self.columns, *self.rows)
        return [[f"{value:.4f}" if isinstance(value, float) else str(value) for value in row] for row in rows]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers; those, and the dash for none, stand to the right."""
        return [any(not isinstance(row[place], str) for row in self.rows) for place in range(len(self.columns))]


@dataclass(frozen=True, slots=True)
class Case:
    """One image beside its overlay and perhaps a third picture, all of them small."""

    caption: str
    image: Image.Image
    overlay: Image.Image
    third: Image.Image | None = None


@dataclass(frozen=True, slots=True)
class Cases:
    """Pictures under one colour scale."""

    title: str
    cases: tuple[Case, ...]
    scale: tuple[float, float]  # map values from low to high for colours, one for all images of a model
    note: str = ""
    third: str = "Nearest good training image"  # what the third pictures are, where there are some


Part = Table | LineChart | Histogram | Cases


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, paragraphs of plain text, and what they speak of."""

    title: str
    text: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()


def case_of(result: Result, kind: str) -> Case:
    """A result (with map and image) as a small picture with its overlay and a caption in words."""
    overlay = result.overlay(side=THUMB, words=False)  # raises without image or map
    rgb = result.image()
    assert rgb is not None
    image = Image.fromarray(rgb)
    image.thumbnail((THUMB, THUMB))
    near = result.nearest_image
    if near is not None:
        near.thumbnail((THUMB, THUMB))
    verdict = "called anomalous" if result.is_anomaly else "called good"
    numbers = f"score {result.score:.2f}, severity {result.severity:.2f}"
    if result.share_local == result.share_local:
        numbers += f", {100 * result.share_local:.0f} % from single places"
    return Case(f"{Path(result.path).name}: {kind}, {numbers}, {verdict}", image, overlay, near)


def write_report(path: Path, title: str, sections: Sequence[Section], facts: Mapping[str, str] | None = None) -> Path:
    """Write a report atomically and return its path; ``facts`` are short statements at its top."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files("twinspect").joinpath("report.html").read_text(encoding="utf-8"))
    album = _Album(sum(len(part.cases) for s in sections for part in s.parts if isinstance(part, Cases)))
    shown = [{"title": s.title, "text": s.text, "parts": [(type(p).__name__, p) for p in s.parts]} for s in sections]
    html = page.render(
        title=title, facts=facts or {}, sections=shown, album=album, gradient=_gradient(), made=__version__
    )
    return write_text(path, html)


class _Album:
    """Pictures of a report as data addresses within one budget: the more there are, the smaller they get."""

    def __init__(self, count: int) -> None:
        self.count, self.left, self.left_out = count, _PICTURE_BYTES, 0
        self.side = next((side for most, side in ((80, THUMB), (300, 128)) if count <= most), 80)

    def addresses(self, case: Case) -> list[str]:
        """Of the image, its overlay and perhaps the third picture; none once the budget is spent."""
        pictures = (case.image, case.overlay, case.third)
        encoded = [self._encoded(picture) for picture in pictures if picture is not None]
        size = sum(map(len, encoded))
        if size > self.left:
            self.left_out += 1
            return []
        self.left -= size
        return encoded

    def _encoded(self, picture: Image.Image) -> str:
        small, data = picture.convert("RGB"), io.BytesIO()
        small.thumbnail((self.side, self.side))
        small.save(data, "JPEG", quality=72, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _gradient() -> str:
    """CSS colour stops of the overlay's scale, one for every doubling."""
    values = np.array([0.0, *(2.0 ** np.arange(-_STOPS + 1, 1))], dtype=np.float32)
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in colourise(values[None], (0.0, 1.0))[0].tolist())
