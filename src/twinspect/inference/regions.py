"""Where an image is anomalous: connected regions of its map above a threshold, in original pixels. No torch.

The threshold comes from the map maxima of good images, so that the promise is per image: at most the stated
share of good images shows any region at all.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinspect.decide.conformal import Floats, p_values

Ints = NDArray[np.int64]


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
