"""What a prediction says about one image, and how to look at it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from twinspect.inference.regions import Region, region_mask

_BOX = (255, 0, 200)  # which neither the colours nor most products have
_BEND = 32.0  # the scale's high end over the value up to which colours are linear
# Blue, cyan, yellow, red at equal steps; readable in print and for the common colour deficiencies.
COLOURS = np.array([[38, 70, 160], [60, 170, 200], [250, 210, 70], [200, 30, 40]], dtype=np.float64)


@dataclass(slots=True)
class Result:
    """One image's answer. Higher scores are more anomalous.

    Attributes:
        path: the file, or a name for an array.
        score: joint raw score (surprise in nats of the Noisy-OR of both students).
        score_local, score_semantic: raw scores of the two students, each on its own scale.
        p_joint: Noisy-OR probability that a normal image scores lower (rounds to 1 for clear anomalies).
        p_value: conformal p-value among the calibration images; small is anomalous.
        is_anomaly: whether the score reaches the threshold.
        threshold: of ``score``, for ``class_name``.
        answer: ``good`` or ``anomaly``; ``unsure`` between ``threshold_unsure`` and ``threshold`` where the
            bundle was calibrated with a third answer.
        threshold_unsure: NaN where there are two answers only.
        class_name: class whose thresholds were used: the one given, else the predicted one.
        predicted_class: most common training class of the nearest cluster.
        class_p: p-value of belonging to a known class (of the distance to that cluster); small means that
            the image shows none of the classes the model knows.
        unknown_class: whether the distance reaches its threshold; None where the model gives no distance.
        cluster_distance: that distance, for comparison within one model only.
        peak: highest value of the map.
        threshold_region: map value from which on pixels belong to a region.
        regions: connected regions in original pixels, strongest first (at most 100).
        model_id: of the model that gave the score.
        map: H x W float32 in the geometry of the original image, in normal spreads.
        scale: (low, high) of the map for colours; the same for every image of a model.
        width, height: of the original image in pixels.
        ms: milliseconds the model took (of a batch, the mean).
        map_path, mask_path: files written for this image, if any.
        error: why the image could not be scored; all scores are NaN then.
    """

    path: str
    score: float = float("nan")
    score_local: float = float("nan")
    score_semantic: float = float("nan")
    p_joint: float = float("nan")
    p_value: float = float("nan")
    is_anomaly: bool | None = None
    threshold: float = float("nan")
    answer: str = ""
    threshold_unsure: float = float("nan")
    class_name: str = ""
    predicted_class: str = ""
    class_p: float = float("nan")
    unknown_class: bool | None = None
    cluster_distance: float = float("nan")
    peak: float = float("nan")
    threshold_region: float = float("nan")
    regions: list[Region] = field(default_factory=list)
    model_id: str = ""
    width: int = 0
    height: int = 0
    ms: float = float("nan")
    map_path: str = ""
    mask_path: str = ""
    error: str = ""
    scale: tuple[float, float] = (0.0, 1.0)
    grid: NDArray[np.float32] | None = field(default=None, repr=False)
    rgb: NDArray[np.uint8] | None = field(default=None, repr=False)

    @property
    def margin(self) -> float:
        """How far the score is above its threshold; negative for good images."""
        return self.score - self.threshold

    @property
    def severity(self) -> float:
        """Score / threshold: 1 and more is anomalous, 2 is twice the threshold. NaN without a threshold."""
        return severity(self.score, self.threshold)

    @property
    def map(self) -> NDArray[np.float32] | None:
        """Anomaly map resized (bilinear, nothing cropped) to the original height and width."""
        return None if self.grid is None else resize_map(self.grid, self.height, self.width)

    def row(self) -> dict[str, Any]:
        """Plain values for a table; ``regions`` is JSON text, as tables hold no lists."""
        names = (
            "path", "class_name", "score", "score_local", "score_semantic", "p_joint", "p_value", "threshold",
            "severity", "margin", "threshold_unsure", "answer", "is_anomaly", "predicted_class", "class_p",
            "unknown_class", "cluster_distance", "peak", "threshold_region", "width", "height", "map_path",
            "mask_path", "model_id", "ms", "error",
        )  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            "n_regions": len(self.regions),
            "max_region_area": max((region.area for region in self.regions), default=0),
            "regions": json.dumps([region.to_dict() for region in self.regions]),
        }

    def overlay(self, opacity: float = 0.5, side: int = 0, words: bool = True) -> Image.Image:
        """The image under its map on the model's fixed colour scale, with outline and box of every region.

        Args:
            opacity: of the map's colours, 0 to 1.
            side: longest side of the picture in pixels; 0: the image's own, which is never enlarged.
            words: answer, score and threshold in a strip above.

        Raises:
            ValueError: the result carries no image or map (an error, or maps were not asked for).
        """
        if self.rgb is None or self.grid is None:
            raise ValueError(f"{self.path}: no map to draw{': ' + self.error if self.error else ''}")
        image = Image.fromarray(self.rgb)
        if side:
            image.thumbnail((side, side))
        colours = colourise(resize_map(self.grid, image.height, image.width), self.scale)
        mixed = Image.blend(image, Image.fromarray(colours), opacity)
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
        for one in self.regions:
            box = (one.x * right, one.y * down, (one.x + one.width) * right, (one.y + one.height) * down)
            pen.rectangle([round(v) + grow for v, grow in zip(box, (-thick, -thick, thick, thick), strict=True)],
                          outline=_BOX, width=thick)  # fmt: skip

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


def severity(score: float, threshold: float) -> float:
    """A score in multiples of its threshold, never cut off; NaN where there is no threshold above 0."""
    return score / threshold if threshold > 0.0 else math.nan


def resize_map(grid: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear resize of a map to height x width."""
    image = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def colourise(values: NDArray[np.float32], scale: tuple[float, float]) -> NDArray[np.uint8]:
    """H x W values to H x W x 3 colours: the scale's low end is blue, its high end red.

    Near the low end colours are linear, above they follow the logarithm (asinh): good images and weak defects are
    told apart, and so are strong and very strong ones.
    """
    place = np.arcsinh((values - scale[0]) * (_BEND / max(scale[1] - scale[0], 1e-9))) / math.asinh(_BEND)
    return np.asarray(_TABLE[(np.clip(place, 0.0, 1.0) * (len(_TABLE) - 1)).astype(np.int64)], dtype=np.uint8)


def _colour_table(steps: int = 1024) -> NDArray[np.uint8]:
    place = np.linspace(0.0, len(COLOURS) - 1, steps)
    channels = [np.interp(place, np.arange(len(COLOURS)), COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, 1).round().astype(np.uint8)


_TABLE = _colour_table()
