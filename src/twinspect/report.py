"""A report: facts and sections of text, tables, charts and pictures, as terminal lines, Markdown, HTML or JSON.

The HTML file (``report.html`` is its template) is self-contained: it opens offline and asks nobody for anything.
Pictures are small JPEGs inside the file and share one budget, so that it stays under five megabytes. A chart says in
words what it shows, for a screen reader.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from twinspect._version import __version__
from twinspect.files import write_text
from twinspect.inference.result import Result, colourise

THUMB = 224  # longest side in pixels of a picture, when there are few
MOST_CHARTS = 12  # classes of a report that get charts
_WRITER = f"twinspect {__version__}"
_PICTURE_BYTES = 4_000_000  # base64 characters of all pictures of a report together
_DOUBLINGS = 6  # of a map's value, from which a colour of the scale begins
_BINS, _MOST_POINTS = 48, 400
_LONG_TAIL = 8.0  # medians, and 1.5 thresholds, beyond which all values share the last bar: good images stay visible


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
        """Which columns hold numbers, or the dash for none; they stand to the right."""
        return [all(cell[:1] in "-.0123456789" for cell in column[1:]) for column in zip(*self.cells(), strict=True)]

    def lines(self) -> Iterator[str]:
        """Aligned columns for the terminal."""
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = ["<", *(">" if number else "<" for number in self.numeric()[1:])]
        yield self.title
        for row in rows:
            cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
            yield "  ".join(["", *cells]).rstrip()
        if self.note:
            yield self.note

    def markdown(self) -> Iterator[str]:
        """The table as lines of GitHub Markdown."""
        head, *body = ([cell.replace("|", "\\|") for cell in row] for row in self.cells())
        yield from ("", f"**{self.title}**", "", f"| {' | '.join(head)} |")
        yield f"|{'|'.join('--:' if number else '---' for number in self.numeric())}|"
        yield from (f"| {' | '.join(row)} |" for row in body)
        if self.note:
            yield from ("", self.note)


# ------------------------------------------------------------------------------------------------------------- charts
# The template draws them; places and heights are percent of a plot's side.


@dataclass(frozen=True, slots=True)
class Axis:
    """From the lowest value to the highest."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Percent of the axis at which a value stands; what lies outside is drawn at its end."""
        return 100.0 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Round values to write at the axis."""
        raw = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


@dataclass(frozen=True)
class Histogram:
    """Counts of groups (at most three) of finite scores over one axis, a row each with its own height."""

    title: str
    groups: Mapping[str, ArrayLike]
    threshold: float | None = None  # a vertical line through all of them

    @cached_property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """The groups as arrays."""
        return {name: np.asarray(values, np.float64) for name, values in self.groups.items()}

    @cached_property
    def axis(self) -> Axis:
        """From the lowest value to the highest, or to where a long tail begins."""
        shown = np.concatenate([*self.values.values(), [0.0, self.threshold or 0.0]])
        low, high = float(shown.min()), float(shown.max())
        limit = max(_LONG_TAIL * float(np.median(np.abs(shown))), 1.5 * (self.threshold or 0.0))
        high = limit if 0.0 < limit < high else high
        return Axis(low, high if high > low else low + 1.0)

    @property
    def cut(self) -> bool:
        """Whether the last bar holds all values from there on."""
        return any(values.max(initial=0.0) > self.axis.high for values in self.values.values())

    def rows(self) -> Iterator[tuple[str, list[float]]]:
        """Of every group its name, and the heights of its bars."""
        for name, values in self.values.items():
            counts, _ = np.histogram(np.minimum(values, self.axis.high), _BINS, (self.axis.low, self.axis.high))
            yield name, (100.0 * counts / max(int(counts.max()), 1)).tolist()

    @property
    def words(self) -> str:
        """What it shows."""
        medians = (f"{n}: median {np.median(v):.3g} of {len(v)}" for n, v in self.values.items() if len(v))
        threshold = "" if self.threshold is None else f" Threshold {self.threshold:.3g}."
        return f"Histogram of score by kind. {'; '.join(medians)}.{threshold}"


@dataclass(frozen=True)
class RocCurve:
    """Share of defects found over share of good images called anomalous, and where the threshold in use stands."""

    title: str
    false_alarms: ArrayLike  # n, of the curve's points
    found: ArrayLike  # n
    in_use: tuple[float, float]

    axis = Axis(0.0, 1.0)  # of both sides

    def path(self) -> str:
        """The curve as an SVG path, through some hundreds of its points: more would only make the file larger."""
        points = np.column_stack([self.false_alarms, 1.0 - np.asarray(self.found, np.float64)])
        some = points[np.linspace(0, len(points) - 1, min(len(points), _MOST_POINTS)).round().astype(int)]
        return "M" + "L".join(f"{100 * x:.1f} {100 * y:.1f}" for x, y in some.tolist())

    @property
    def words(self) -> str:
        """What it shows."""
        alarms, found = self.in_use
        return (
            "Line chart of defects found over good images called anomalous. The threshold in use finds "
            f"{found:.3g} of the defects and calls {alarms:.3g} of the good images anomalous."
        )


# ----------------------------------------------------------------------------------------------------------- pictures


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
    if math.isfinite(result.share_local):
        numbers += f", {100 * result.share_local:.0f} % from single places"
    return Case(f"{Path(result.path).name}: {kind}, {numbers}, {verdict}", image, overlay, near)


class _Album:
    """Pictures of a report as data addresses within one budget: the more there are, the smaller they get."""

    def __init__(self, count: int) -> None:
        self.count, self.left, self.left_out = count, _PICTURE_BYTES, 0
        self.side = next((side for most, side in ((80, THUMB), (300, 128)) if count <= most), 80)

    def addresses(self, case: Case) -> list[str]:
        """Of the image, its overlay and perhaps the third picture; none once the budget is spent."""
        encoded = []
        for picture in filter(None, (case.image, case.overlay, case.third)):
            small, data = picture.convert("RGB"), io.BytesIO()
            small.thumbnail((self.side, self.side))
            small.save(data, "JPEG", quality=72, optimize=True)
            encoded.append("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii"))
        size = sum(map(len, encoded))
        if size > self.left:
            self.left_out += 1
            return []
        self.left -= size
        return encoded


# ------------------------------------------------------------------------------------------------------------- report

Part = Table | Histogram | RocCurve | Cases


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, paragraphs of plain text, and what they speak of."""

    title: str
    text: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    printed: bool = True  # whether the terminal shows its text and tables too

    @property
    def tables(self) -> list[Table]:
        """The tables among its parts."""
        return [part for part in self.parts if isinstance(part, Table)]

    def lines(self) -> Iterator[str]:
        """Text and tables for the terminal."""
        yield from self.text
        for table in self.tables:
            yield from table.lines()


@dataclass(frozen=True, slots=True)
class Report:
    """What a command has found."""

    title: str
    sections: Sequence[Section]
    facts: Mapping[str, str] = field(default_factory=dict)  # short statements at the top
    values: Mapping[str, Any] = field(default_factory=dict)  # the numbers, ready for JSON

    def lines(self) -> Iterator[str]:
        """The sections that the terminal shows."""
        for section in self.sections:
            if section.printed:
                yield from section.lines()

    def markdown(self) -> str:
        """Facts, paragraphs and tables as GitHub Markdown; charts and pictures are for HTML only."""
        facts = {"written by": _WRITER, **self.facts}
        lines = [f"# {self.title}", "", *(f"- {name}: {value}" for name, value in facts.items())]
        for section in self.sections:
            if section.text or section.tables:
                lines += ["", f"## {section.title}"]
            for text in section.text:
                lines += ["", text]
            for table in section.tables:
                lines += table.markdown()
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """Everything as one self-contained page."""
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(files("twinspect").joinpath("report.html").read_text(encoding="utf-8"))
        album = _Album(sum(len(p.cases) for s in self.sections for p in s.parts if isinstance(p, Cases)))
        doublings = np.array([[0.0, *(2.0 ** np.arange(-_DOUBLINGS, 1))]], dtype=np.float32)
        stops = ", ".join(f"rgb({r} {g} {b})" for r, g, b in colourise(doublings, (0.0, 1.0))[0].tolist())
        kind = attrgetter("__class__.__name__")
        return page.render(report=self, kind=kind, album=album, gradient=stops, writer=_WRITER)

    def json(self) -> str:
        """The values, in ASCII, which every code page takes."""
        return json.dumps({**self.values, "written_by": _WRITER}, indent=1) + "\n"

    def write(self, path: Path) -> Path:
        """Write the file that its ending (of `FORMATS`) asks for, whole or not at all."""
        return write_text(path, FORMATS[path.suffix.lower()](self))


FORMATS = {".md": Report.markdown, ".html": Report.html, ".json": Report.json}
