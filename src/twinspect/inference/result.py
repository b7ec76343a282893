"""What a prediction says about one image: its columns, its regions, its pictures. No torch.

The threshold of regions comes from the map maxima of good images, so its promise is per image: at most the stated
share of good images shows any region at all.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.data.images import read_rgb
from twinspect.decide.conformal import Floats, p_values

# Blue, cyan, yellow, red at equal steps; readable in print and for the common colour deficiencies.
COLOURS = np.array([[38, 70, 160], [60, 170, 200], [250, 210, 70], [200, 30, 40]], dtype=np.float64)
Ints = NDArray[np.int64]


class Column(NamedTuple):
    """A column of results.

    Attributes:
        name: the same in tables, answers of the server, the inspection log and Python.
        kind: a key of ``CELLS``.
        help: what the value says.
        tables_only: names a file that ``predict`` writes; the server and its log have no such value.
        derived: follows from other columns, so that nothing need store it.
    """

    name: str
    kind: str
    help: str
    tables_only: bool = False
    derived: bool = False


# Kind -> type of a table's cell as pyarrow names it, and the value where nothing is known.
CELLS: dict[str, tuple[str, Any]] = {
    "string": ("string", ""), "double": ("double", math.nan), "bool": ("bool", None), "int32": ("int32", 0),
    "int64": ("int64", 0), "regions": ("string", ()),
}  # fmt: skip
# Properties of `Result` that are columns, with their kinds; the docstring is the help.
_DERIVED = {
    "severity": "double", "margin": "double", "p_joint": "double", "n_regions": "int32", "max_region_area": "int64",
}  # fmt: skip


def column(kind: str, help: str, tables_only: bool = False) -> Any:
    """A field of `Result` that is a column."""
    metadata = {"kind": kind, "help": help, "tables_only": tables_only}
    if kind == "regions":
        return field(default_factory=list, metadata=metadata)
    return field(default=CELLS[kind][1], metadata=metadata)


_OUTSIDE = 0.4  # brightness of what lies outside of the region of interest


@dataclass(slots=True)
class Result:
    """One image's answer. Higher scores are more anomalous.

    A field made by `column` is a column everywhere: in tables, the server's answers and their OpenAPI schema, the
    inspection log, and the list in ``docs/scale.md``. So is a property named in ``_DERIVED``.

    Attributes:
        scale: (low, high) of the map for colours; the same for every image of a model.
        grid: anomaly map at the model's own size, in standard deviations; None if not asked for.
        roi: region of interest on a square grid over the image, true inside; None for the whole image.
        rgb: the image for overlays, H x W x 3; None if not asked for.
    """

    path: str = column("string", "File (`ARCHIVE.tar#MEMBER` in an archive), or a name for an array")
    score: float = column("double", "Joint score of both students, in nats")
    score_local: float = column("double", "Score of the local student, on its own scale")
    score_semantic: float = column("double", "Score of the semantic student, on its own scale")
    p_value: float = column("double", "Conformal p-value among the calibration images; small is anomalous")
    is_anomaly: bool | None = column("bool", "Whether the score reaches the threshold")
    threshold: float = column("double", "Threshold of `score` for `class_name`")
    answer: str = column("string", "`good`, `anomaly`, or `unsure` where a third answer was calibrated")
    threshold_unsure: float = column("double", "Score from which the answer is `unsure`, if there is such an answer")
    class_name: str = column("string", "Class whose thresholds were used: the one given, else the predicted one")
    predicted_class: str = column("string", "Most common training class of the nearest cluster")
    class_p: float = column("double", "P-value of belonging to a known class; if small, the image shows none of them")
    unknown_class: bool | None = column("bool", "Whether `cluster_distance` reaches its threshold")
    cluster_distance: float = column("double", "Distance to the nearest cluster; compare within one model only")
    peak: float = column("double", "Highest value of the map")
    threshold_region: float = column("double", "Map value from which on pixels belong to a region")
    regions: list[Region] = column("regions", "Connected regions in original pixels, strongest first, at most 100")
    model_id: str = column("string", "Model that gave the score")
    width: int = column("int32", "Width of the original image in pixels")
    height: int = column("int32", "Height of the original image in pixels")
    ms: float = column("double", "Milliseconds the model took; of a batch, the mean")
    map_path: str = column("string", "Map written for this image", tables_only=True)
    mask_path: str = column("string", "Mask written for this image", tables_only=True)
    error: str = column("string", "Why the image could not be scored; it has no scores then")
    scale: tuple[float, float] = (0.0, 1.0)
    grid: NDArray[np.float32] | None = field(default=None, repr=False)
    rgb: NDArray[np.uint8] | None = field(default=None, repr=False)
    roi: NDArray[np.bool_] | None = field(default=None, repr=False)

    @property
    def severity(self) -> float:
        """`score` / `threshold`, never cut off: from 1 on it is an anomaly."""
        return self.score / self.threshold if self.threshold > 0.0 else math.nan

    @property
    def margin(self) -> float:
        """`score` minus `threshold`; negative for good images."""
        return self.score - self.threshold

    @property
    def p_joint(self) -> float:
        """Noisy-OR probability that a normal image scores lower; rounds to 1 for clear anomalies."""
        return -math.expm1(-max(self.score, 0.0))

    @property
    def n_regions(self) -> int:
        """Number of regions."""
        return len(self.regions)

    @property
    def max_region_area(self) -> int:
        """Pixels of the largest region."""
        return max((region.area for region in self.regions), default=0)

    @property
    def map(self) -> NDArray[np.float32] | None:
        """Anomaly map resized (bilinear, nothing cropped) to the original height and width."""
        return None if self.grid is None else resize_map(self.grid, self.height, self.width)

    def row(self) -> dict[str, Any]:
        """Plain values for a table; ``regions`` is JSON text, as tables hold no lists."""
        values = {column.name: getattr(self, column.name) for column in columns()}
        return {**values, "regions": json.dumps([region.to_dict() for region in self.regions])}

    def answer_row(self) -> dict[str, Any]:
        """Plain values for JSON, as the server gives them: ``name`` is the path, None is not-a-number."""
        values = {column.name: finite(getattr(self, column.name)) for column in columns() if not column.tables_only}
        return {"name": values.pop("path"), **values, "regions": [region.to_dict() for region in self.regions]}

    def image(self) -> NDArray[np.uint8] | None:
        """The image, H x W x 3 RGB: as it was kept, else read again from its file; None where neither is possible."""
        if self.rgb is not None or self.error or not os.path.isfile(self.path):
            return self.rgb
        return read_rgb(Path(self.path))

    def overlay(self, opacity: float = 0.5) -> Image.Image:
        """The image under its map, on the model's fixed colour scale.

        Raises:
            ValueError: the result carries no image or map (an error, or maps were not asked for).
        """
        rgb = self.image()
        if rgb is None or self.grid is None:
            raise ValueError(f"{self.path}: no map to draw{': ' + self.error if self.error else ''}")
        side = rgb.shape[:2]
        colours = colourise(resize_map(self.grid, *side), self.scale)
        mixed = (1 - opacity) * rgb + opacity * colours
        if self.roi is not None:  # what is not looked at: grey and dark
            outside = resize_map(self.roi.astype(np.float32), *side) < 0.5
            mixed[outside] = _OUTSIDE * rgb[outside].mean(-1, keepdims=True)
        return Image.fromarray(mixed.round().astype(np.uint8))


@cache
def columns() -> tuple[Column, ...]:
    """All columns of a result, in the order of tables."""
    stored = (Column(one.name, **one.metadata) for one in fields(Result) if one.metadata)
    derived = (
        Column(name, kind, getattr(Result, name).__doc__.rstrip("."), derived=True) for name, kind in _DERIVED.items()
    )
    return (*stored, *derived)


def finite(value: Any) -> Any:
    """The value itself; None for a float that JSON and SQL cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def resize_map(grid: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear resize of a map to height x width."""
    image = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def colourise(values: NDArray[np.float32], scale: tuple[float, float]) -> NDArray[np.float64]:
    """H x W values to H x W x 3 colours; the scale's low end is blue, its high end red."""
    low, high = scale
    place = np.clip((values - low) / max(high - low, 1e-9), 0.0, 1.0) * (len(COLOURS) - 1)
    index = np.minimum(place.astype(int), len(COLOURS) - 2)
    part = (place - index)[..., None]
    return np.asarray((1 - part) * COLOURS[index] + part * COLOURS[index + 1], dtype=np.float64)


# ------------------------------------------------------------------------------------------------------------ regions


class Components(NamedTuple):
    """8-connected regions, numbered in reading order of their first pixel; one place per region.

    Attributes:
        area: pixels.
        peak: highest value inside.
        top, left, bottom, right: smallest box; bottom and right are outside.
        run_row, run_start, run_stop, run_owner: one place per horizontal run: its row, first column, column after
            the last, and region.
    """

    area: Ints
    peak: NDArray[np.float64]
    top: Ints
    left: Ints
    bottom: Ints
    right: Ints
    run_row: Ints
    run_start: Ints
    run_stop: Ints
    run_owner: Ints


def components(mask_HW: NDArray[np.bool_], values_HW: NDArray[np.float32]) -> Components:
    """Regions of ``mask_HW`` and what is known of each."""
    row, start, stop = _runs(mask_HW)
    owner = _owners(row, start, stop)
    count = int(owner.max()) + 1 if len(owner) else 0
    peaks = _run_peaks(values_HW, row, start, stop)
    top, left = np.full(count, mask_HW.shape[0]), np.full(count, mask_HW.shape[1])
    bottom, right, area = (np.zeros(count, np.int64) for _ in range(3))
    peak = np.full(count, -np.inf)
    np.minimum.at(top, owner, row)
    np.minimum.at(left, owner, start)
    np.maximum.at(bottom, owner, row + 1)
    np.maximum.at(right, owner, stop)
    np.add.at(area, owner, stop - start)
    np.maximum.at(peak, owner, peaks)
    return Components(area, peak, top, left, bottom, right, row, start, stop, owner)


def pixels_of(found: Components, region: int) -> tuple[Ints, Ints]:
    """Rows and columns of a region's pixels, in reading order."""
    own = found.run_owner == region
    length = found.run_stop[own] - found.run_start[own]
    offset = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    return np.repeat(found.run_row[own], length), np.repeat(found.run_start[own], length) + offset


def _runs(mask_HW: NDArray[np.bool_]) -> tuple[Ints, Ints, Ints]:
    """Row, first column and column after the last of every horizontal run, in reading order."""
    height, width = mask_HW.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask_HW
    steps = np.diff(padded, axis=1)
    row, start = np.nonzero(steps == 1)
    return row, start, np.nonzero(steps == -1)[1]


def _run_peaks(values_HW: NDArray[np.float32], row: Ints, start: Ints, stop: Ints) -> NDArray[np.float64]:
    if not len(row):
        return np.zeros(0)
    width = values_HW.shape[1]
    flat = np.append(values_HW.ravel(), -np.inf)  # so that a run may end at the last pixel
    bounds = np.stack([row * width + start, row * width + stop], 1).ravel()
    return np.asarray(np.maximum.reduceat(flat, bounds)[::2], dtype=np.float64)


def _owners(row: Ints, start: Ints, stop: Ints) -> Ints:
    """Region number of every run: runs of neighbouring rows that touch, also by a corner, belong together."""
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of_row = np.searchsorted(row, np.arange(int(row[-1]) + 2)) if len(row) else np.zeros(0, np.int64)
    for here, y in enumerate(row.tolist()):
        if y == 0:
            continue
        above = slice(int(first_of_row[y - 1]), int(first_of_row[y]))
        low = above.start + int(np.searchsorted(stop[above], start[here], side="left"))
        high = above.start + int(np.searchsorted(start[above], stop[here], side="right"))
        for other in range(low, high):
            a, b = root(here), root(other)
            parent[max(a, b)] = min(a, b)
    roots = np.array([root(i) for i in range(len(row))], dtype=np.int64)
    return np.asarray(np.unique(roots, return_inverse=True)[1], dtype=np.int64)


MOST_PIXELS = 4_000_000  # regions of larger images are found on a smaller map and scaled
MOST_REGIONS = 100  # listed per image, strongest first


@dataclass(frozen=True, slots=True)
class Region:
    """One connected region.

    Attributes:
        x, y, width, height: smallest box around it, in original pixels; (x, y) is its top left pixel.
        area: pixels of the region itself.
        score: highest map value inside.
        p_value: share of good images (n + 1 rule) whose map reaches that value anywhere.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    score: float
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def find_regions(grid: NDArray[np.float32], shape: tuple[int, int], threshold: float, peaks: Floats) -> list[Region]:
    """Regions of at least ``threshold``, strongest first, at most ``MOST_REGIONS``.

    Args:
        grid: map at the model's own size.
        shape: height and width of the original image.
        threshold: of map values.
        peaks: map maxima of good images.
    """
    if not bool((grid >= threshold).any()):
        return []  # bilinear resizing never exceeds the grid's own values
    resized = resized_for_regions(grid, shape)
    found = components(resized >= threshold, resized)
    scores = found.peak
    if not len(scores):
        return []
    p = p_values(scores, peaks)
    strongest = np.argsort(-scores, kind="stable")[:MOST_REGIONS]
    scale = (shape[0] / resized.shape[0], shape[1] / resized.shape[1])
    return [_region(found, int(i), p[i], scale, shape) for i in strongest]


def resized_for_regions(grid: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """A map in the image's own height and width, or smaller by one factor where that is above ``MOST_PIXELS``."""
    from twinspect.inference.result import resize_map

    height, width = shape
    factor = max(1.0, math.sqrt(height * width / MOST_PIXELS))
    return resize_map(grid, max(1, round(height / factor)), max(1, round(width / factor)))


def _region(found: Components, i: int, p: float, scale: tuple[float, float], shape: tuple[int, int]) -> Region:
    y, x = math.floor(found.top[i] * scale[0]), math.floor(found.left[i] * scale[1])
    bottom = min(shape[0], math.ceil(found.bottom[i] * scale[0]))
    right = min(shape[1], math.ceil(found.right[i] * scale[1]))
    pixels = max(1, round(int(found.area[i]) * scale[0] * scale[1]))
    return Region(x, y, right - x, bottom - y, pixels, float(found.peak[i]), float(p))
