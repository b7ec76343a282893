"""What a prediction says about one image, and how to look at it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.data.images import read_rgb
from twinspect.inference.regions import Region

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
        return Image.fromarray(mixed.round().astype(np.uint8))


def severity(score: float, threshold: float) -> float:
    """A score in multiples of its threshold, never cut off; NaN where there is no threshold above 0."""
    return score / threshold if threshold > 0.0 else math.nan


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
