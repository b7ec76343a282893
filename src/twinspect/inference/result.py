"""What a prediction says about one image: its columns and its pictures. No torch."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from twinspect.data.images import read_rgb
from twinspect.errors import required
from twinspect.inference.regions import Region, region_mask, resize_map

_BOX = (255, 0, 200)  # which neither the colours nor most products have
_NOTEBOOK_SIDE = 640  # pixels
_OUTSIDE = 0.4  # brightness of what lies outside of the region of interest
_BEND = 32.0  # the scale's high end over the value up to which colours are linear
# Blue, cyan, yellow, red at equal steps; readable in print and for the common colour deficiencies.
COLOURS = np.array([[38, 70, 160], [60, 170, 200], [250, 210, 70], [200, 30, 40]], dtype=np.float64)
_STEPS, _KNOWN = np.linspace(0.0, len(COLOURS) - 1, 1024), np.arange(len(COLOURS))
_TABLE = np.stack([np.interp(_STEPS, _KNOWN, channel) for channel in COLOURS.T], 1).round().astype(np.uint8)


class Column(NamedTuple):
    """A column of results, the same in tables, answers of the server, the inspection log and Python."""

    name: str  # of the field or property of `Result`
    kind: str  # a key of ``CELLS``
    help: str
    tables_only: bool = False  # names a file that ``predict`` writes; the server and its log have no such value
    derived: bool = False  # follows from other columns, so that nothing need store it


# Kind -> type of a table's cell as pyarrow names it, and the value where nothing is known.
CELLS: dict[str, tuple[str, Any]] = {
    "string": ("string", ""), "double": ("double", math.nan), "bool": ("bool", None), "int32": ("int32", 0),
    "int64": ("int64", 0), "regions": ("string", ()),
}  # fmt: skip
# Properties of `Result` that are columns, with their kinds; the docstring is the help.
_DERIVED = {
    "severity": "double", "margin": "double", "p_joint": "double", "share_local": "double", "n_regions": "int32",
    "max_region_area": "int64", "nearest": "string",
}  # fmt: skip


def column(kind: str, help: str, tables_only: bool = False) -> Any:
    """A field of `Result` that is a column."""
    metadata = {"kind": kind, "help": help, "tables_only": tables_only}
    if kind == "regions":
        return field(default_factory=list, metadata=metadata)
    return field(default=CELLS[kind][1], metadata=metadata)


@dataclass(slots=True)
class Result:
    """One image's answer. Higher scores are more anomalous.

    A field made by `column` is a column everywhere: in tables, the server's answers and their OpenAPI schema, the
    inspection log, and the list in ``docs/reference/columns.md``. So is a property named in ``_DERIVED``.

    Attributes:
        scale: (low, high) of the map for colours; the same for every image of a model.
        grid: anomaly map at the model's own size, in standard deviations; None if not asked for.
        roi: region of interest on a square grid over the image, true inside; None for the whole image.
        rgb: the image for overlays, H x W x 3; None if not asked for.
        near: name and small JPEG of the nearest good training image; empty where the bundle does not know them.
    """

    path: str = column("string", "File (`ARCHIVE.tar#MEMBER` in an archive), or a name for an array")
    score: float = column("double", "How unusual the image is: the two scores below, joined; in nats")
    score_local: float = column(
        "double", "How unusual its most unusual places are (a scratch), on a scale of its own"
    )
    score_semantic: float = column("double", "How unusual it is as a whole (another part), on a scale of its own")
    p_value: float = column(
        "double", "Share of good images that score as high, by the calibration images; small is anomalous"
    )
    is_anomaly: bool | None = column("bool", "Whether the score reaches the threshold")
    threshold: float = column("double", "Threshold of `score` for `class_name`")
    answer: str = column("string", "`good`, `anomaly`, or `unsure` where a third answer was calibrated")
    threshold_unsure: float = column("double", "Score from which the answer is `unsure`, if there is such an answer")
    class_name: str = column("string", "Class whose thresholds were used: the one given, else the predicted one")
    predicted_class: str = column("string", "Class that the image looks like most: that of the nearest cluster")
    class_p: float = column(
        "double", "P-value of `cluster_distance`; if small, the image shows no class that the model knows"
    )
    unknown_class: bool | None = column(
        "bool", "Whether it shows no class that the model knows: `cluster_distance` reaches its threshold"
    )
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
    near: tuple[str, bytes] = field(default=("", b""), repr=False)

    def __repr__(self) -> str:
        return f"Result({self.path!r}, {self.reasons()})"

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
        """Noisy-OR probability that a good image scores lower; rounds to 1 for clear anomalies."""
        return -math.expm1(-max(self.score, 0.0))

    @property
    def share_local(self) -> float:
        """Share of `score` that single places give, 0 to 1; the rest is of the image as a whole."""
        local, semantic = _surprise(self.score_local), _surprise(self.score_semantic)
        if not self.score > 0.0 or math.isclose(self.score, local, rel_tol=2e-3):  # a family without the other
            return 1.0 if self.score > 0.0 else math.nan
        return min(max(1.0 - semantic / self.score, 0.0), 1.0)

    @property
    def nearest(self) -> str:
        """The good training image that is most similar, by what the teacher sees in the whole of it."""
        return self.near[0]

    @property
    def nearest_image(self) -> Image.Image | None:
        """The thumbnail of `nearest` that the bundle keeps; None without one."""
        return Image.open(io.BytesIO(self.near[1])).convert("RGB") if self.near[1] else None

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
        """As `to_dict`, for a table: ``regions`` is JSON text, as tables hold no lists."""
        values = self.to_dict()
        return {**values, "regions": json.dumps(values["regions"])}

    def answer_row(self) -> dict[str, Any]:
        """As `to_dict`, as the server gives it: ``name`` is the path, and no file was written."""
        values, no_files = self.to_dict(), {column.name for column in columns() if column.tables_only}
        return {"name": values.pop("path"), **{name: v for name, v in values.items() if name not in no_files}}

    def to_dict(self) -> dict[str, Any]:
        """All columns as plain values for JSON: regions are a list, None is not-a-number."""
        values = {column.name: finite(getattr(self, column.name)) for column in columns()}
        return {**values, "regions": [asdict(region) for region in self.regions]}

    def to_pandas(self) -> Any:
        """All columns as a pandas Series; of many results, see `Results.to_pandas`.

        Raises:
            ConfigError: pandas is not installed.
        """
        return Results([self]).to_pandas().iloc[0]

    def _repr_png_(self) -> bytes | None:
        """The overlay, which notebooks show; None without map and image."""
        if self.grid is None or self.image() is None:
            return None
        body = io.BytesIO()
        self.overlay(side=_NOTEBOOK_SIDE).save(body, "PNG")
        return body.getvalue()

    def explain(self) -> dict[str, Any]:
        """Why this answer, ready for JSON.

        Returns:
            As `to_dict`, with ``shares`` of the score of the ``local`` and the ``semantic`` student, and the same in
            a few sentences as ``text``.
        """
        local = finite(self.share_local)
        shares = None if local is None else {"local": local, "semantic": 1.0 - local}
        return {**self.to_dict(), "shares": shares, "text": self.reasons()}

    def reasons(self) -> str:
        """Why this answer, in a few sentences."""
        if self.error:
            return self.error
        times = f", {self.severity:.2f} times the threshold" if self.severity == self.severity else ""
        reasons = [f"{self.answer or 'no answer'}: score {self.score:.3g}{times} of {self.threshold:.3g}"]
        if self.share_local == self.share_local:
            share = f"{100 * self.share_local:.0f} %"
            reasons.append(f"{share} of it from single places, the rest from the image as a whole")
        if self.regions:
            region = self.regions[0]
            number = counted(self.n_regions, "region")
            reasons.append(f"{number}, the strongest {region.width} x {region.height} at ({region.x}, {region.y})")
        elif self.is_anomaly and self.grid is not None:
            row, column = np.unravel_index(int(self.grid.argmax()), self.grid.shape)
            down, right = self.height / self.grid.shape[0], self.width / self.grid.shape[1]
            x, y = int((column + 0.5) * right), int((row + 0.5) * down)
            reasons.append(f"no place alone is beyond those of good images; the map is highest at ({x}, {y})")
        reasons += [f"nearest good image {self.nearest}"] if self.nearest else []
        return "; ".join(reasons)

    def image(self) -> NDArray[np.uint8] | None:
        """The image, H x W x 3 RGB: as it was kept, else read again from its file; None where neither is possible."""
        if self.rgb is not None or self.error or not os.path.isfile(self.path):
            return self.rgb
        return read_rgb(Path(self.path))

    def overlay(self, opacity: float = 0.5, side: int = 0, words: bool = True) -> Image.Image:
        """The image under its map on the model's fixed colour scale, with outline and box of every region.

        Args:
            opacity: of the map's colours, 0 to 1.
            side: longest side of the picture in pixels; 0: the image's own, which is never enlarged.
            words: answer, score and threshold in a strip above.

        Raises:
            ValueError: the result carries no image or map (an error, or maps were not asked for).
        """
        rgb = self.image()
        if rgb is None or self.grid is None:
            raise ValueError(f"{self.path}: no map to draw{': ' + self.error if self.error else ''}")
        image = Image.fromarray(rgb)
        if side:
            image.thumbnail((side, side))
        colours = colourise(resize_map(self.grid, image.height, image.width), self.scale)
        mixed = Image.blend(image, Image.fromarray(colours), opacity)
        if self.roi is not None:  # what is not looked at: grey and dark
            inside = Image.fromarray(self.roi).resize(image.size)
            mixed = Image.composite(mixed, image.convert("L").point(lambda v: _OUTSIDE * v).convert("RGB"), inside)
        self._mark(mixed)
        return self._titled(mixed) if words else mixed

    def _mark(self, picture: Image.Image) -> None:
        if not self.regions or self.grid is None or self.threshold_region != self.threshold_region:
            return
        thick, pen = max(1, round(max(picture.size) / 400)), ImageDraw.Draw(picture)
        mask = region_mask(self.grid, (picture.height, picture.width), self.threshold_region)
        beside = np.pad(mask, thick)  # shifted by a line's thickness each way: the rim is what any of them uncovers
        shifts = ((0, thick), (2 * thick, thick), (thick, 0), (thick, 2 * thick))
        inner = np.all([beside[y : y + mask.shape[0], x : x + mask.shape[1]] for y, x in shifts], axis=0)
        picture.paste((255, 255, 255), mask=Image.fromarray(mask & ~inner).convert("L"))
        right, down = picture.width / self.width, picture.height / self.height
        for region in self.regions:
            top, bottom = round(region.y * down) - thick, round((region.y + region.height) * down) + thick
            left, end = round(region.x * right) - thick, round((region.x + region.width) * right) + thick
            pen.rectangle((left, top, end, bottom), outline=_BOX, width=thick)

    def _titled(self, picture: Image.Image) -> Image.Image:
        text = f"{self.answer or 'no answer'}  score {self.score:.4g}, threshold {self.threshold:.4g}"
        text += f"  {self.class_name}" if self.class_name else ""
        size = min(40, max(10, picture.width // 30))
        whole = Image.new("RGB", (picture.width, picture.height + 2 * size), (20, 20, 20))
        whole.paste(picture, (0, 2 * size))
        colour = _BOX if self.is_anomaly else (255, 255, 255)
        text = text.encode("latin-1", "replace").decode("latin-1")  # what the font that comes with Pillow holds
        ImageDraw.Draw(whole).text((size // 2, size // 2), text, colour, ImageFont.load_default(size))
        return whole


class Results(list[Result]):
    """What `Detector.predict` gives of several images: a list that turns into a table."""

    def to_pandas(self) -> Any:
        """A pandas DataFrame: one row an image, the columns of ``predict --out``, regions as lists of dicts.

        Raises:
            ConfigError: pandas is not installed.
        """
        pandas = required("pandas", "to_pandas")
        names = [column.name for column in columns()]
        return pandas.DataFrame([result.to_dict() for result in self], columns=names)


@cache
def columns() -> tuple[Column, ...]:
    """All columns of a result, in the order of tables."""
    stored = (Column(member.name, **member.metadata) for member in fields(Result) if member.metadata)
    derived = (
        Column(name, kind, getattr(Result, name).__doc__.rstrip("."), derived=True) for name, kind in _DERIVED.items()
    )
    return (*stored, *derived)


def _surprise(z: float) -> float:
    """As `models/layers.surprise`, of one number: -log(1 - Phi(z)) in nats; beyond 30 its tangent."""
    near = min(z, 30.0)
    return 30.0 * max(z - 30.0, 0.0) - math.log(0.5 * math.erfc(near / math.sqrt(2.0)))


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def finite(value: Any) -> Any:
    """The value itself; None for a float that JSON and SQL cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def colourise(values: NDArray[np.float32], scale: tuple[float, float]) -> NDArray[np.uint8]:
    """H x W values to H x W x 3 colours: the scale's low end is blue, its high end red.

    Near the low end colours are linear, above they follow the logarithm (asinh): good images and weak defects are
    told apart, and so are strong and very strong ones.
    """
    place = np.arcsinh((values - scale[0]) * (_BEND / max(scale[1] - scale[0], 1e-9))) / math.asinh(_BEND)
    return np.asarray(_TABLE[(np.clip(place, 0.0, 1.0) * (len(_TABLE) - 1)).astype(np.int64)], dtype=np.uint8)
