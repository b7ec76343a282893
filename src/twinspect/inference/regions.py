"""Where an image is anomalous: connected regions of its map above a threshold, in original pixels. No torch.

The threshold comes from the map maxima of good images, so that the promise is per image: at most the stated
share of good images shows any region at all.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.calibration import Floats, p_values
from twinspect.inference.label import Components, components

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
