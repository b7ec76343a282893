"""Connected regions of an anomaly map: boxes in original pixels, masks, outlines. No torch.

Whether there is a region is decided by a threshold, which comes from the map maxima of good images, so that the
promise is per image: at most the stated share of good images shows any region at all. An image that is called bad by
its score shows its strongest place in any case (`strongest_place`). How far a region reaches is
decided by the map's own heights: at one threshold for all, a strong defect would be a blot and a weak one a dot. Both
shares of it were chosen on masks of five sets (docs/results.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.decide.conformal import Floats, p_values

Map = NDArray[np.float32]
Bools = NDArray[np.bool_]
OF_PEAK = 0.5**2  # of a region's height above the image's level, that all its pixels reach; see `connected`
OF_NEARBY = 0.8**2  # of the highest value nearby (above the level), that they reach as well
NEARBY = 0.055  # of the map's side: how far that is, each way; about the blur
MOST_PIXELS = 4_000_000  # regions of larger images are found on a smaller map and scaled
MOST_REGIONS = 100  # listed per image, strongest first
_DOWN, _RIGHT = (0, 1, 0, -1), (1, 0, -1, 0)  # steps to the right, down, left, up


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


class Components(NamedTuple):
    """8-connected regions, numbered in reading order of their first pixel.

    Attributes:
        label_HW: 1 + the number of each pixel's region; 0 outside of all.
        area_R: pixels.
        peak_R: highest value inside.
        box_R4: top, left, bottom, right of the smallest box; bottom and right are outside.
    """

    label_HW: NDArray[np.int64]
    area_R: NDArray[np.int64]
    peak_R: NDArray[np.float64]
    box_R4: NDArray[np.int64]

    def painted(self, value_R: NDArray[Any]) -> NDArray[Any]:
        """An image in which every pixel of a region has the region's value, and all others 0."""
        return np.concatenate([np.zeros(1, value_R.dtype), value_R])[self.label_HW]


def components(mask_HW: Bools, values_HW: Map) -> Components:
    """Regions of ``mask_HW`` and what is known of each."""
    steps = np.diff(np.pad(mask_HW.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row, start = np.nonzero(steps == 1)  # horizontal runs of pixels, in reading order
    stop = np.nonzero(steps == -1)[1]
    owner = _regions_of_runs(row, start, stop)
    count = int(owner.max(initial=-1)) + 1
    label_HW = np.zeros(mask_HW.shape, np.int64)
    label_HW[mask_HW] = np.repeat(owner, stop - start) + 1
    area, peak, box = np.zeros(count, np.int64), np.full(count, -np.inf), np.zeros((count, 4), np.int64)
    box[:, :2] = mask_HW.shape
    np.add.at(area, owner, stop - start)
    if count:  # the highest value of every run, then of every region
        begins = np.cumsum(stop - start) - (stop - start)
        np.maximum.at(peak, owner, np.maximum.reduceat(values_HW[mask_HW], begins))
    for place, (smaller, value) in enumerate(
        ((np.minimum, row), (np.minimum, start), (np.maximum, row + 1), (np.maximum, stop))
    ):
        smaller.at(box[:, place], owner, value)
    return Components(label_HW, area, peak, box)


def _regions_of_runs(row: NDArray[Any], start: NDArray[Any], stop: NDArray[Any]) -> NDArray[np.int64]:
    """Region number of every run: runs of neighbouring rows that touch, also by a corner, belong together."""
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of_row = np.searchsorted(row, np.arange(int(row.max(initial=-1)) + 2))
    for run, y in enumerate(row.tolist()):
        if y == 0:
            continue
        above = slice(int(first_of_row[y - 1]), int(first_of_row[y]))
        low = above.start + int(np.searchsorted(stop[above], start[run], side="left"))
        high = above.start + int(np.searchsorted(start[above], stop[run], side="right"))
        for touching in range(low, high):
            a, b = root(run), root(touching)
            parent[max(a, b)] = min(a, b)
    roots = np.array([root(i) for i in range(len(row))], dtype=np.int64)
    return np.asarray(np.unique(roots, return_inverse=True)[1], dtype=np.int64)


def find_regions(grid: Map, shape: tuple[int, int], threshold: float, peaks: Floats) -> list[Region]:
    """Regions of a map of the model's own size, strongest first, at most ``MOST_REGIONS``.

    ``shape`` is height and width of the original image. A region reaches the ``threshold`` somewhere. ``peaks`` are
    the map maxima of good images.
    """
    regions = connected(grid, shape, threshold)
    p_R = p_values(regions.peak_R, peaks)
    down, right = (side / measured for side, measured in zip(shape, regions.label_HW.shape, strict=True))
    listed = []
    for i in strongest(regions):
        top, left, bottom, end = regions.box_R4[i].tolist()
        x, y = math.floor(left * right), math.floor(top * down)
        width, height = min(shape[1], math.ceil(end * right)) - x, min(shape[0], math.ceil(bottom * down)) - y
        area = max(1, round(int(regions.area_R[i]) * down * right))
        listed.append(Region(x, y, width, height, area, float(regions.peak_R[i]), float(p_R[i])))
    return listed


def strongest_place(grid: Map, shape: tuple[int, int]) -> float:
    """The threshold at which a map shows its strongest place and what is nearly as strong; infinite if it is flat."""
    peak, level = float(_resized(grid, shape).max()), float(np.median(grid))
    return level + OF_NEARBY * (peak - level) if peak > level else math.inf


def strongest(regions: Components) -> list[int]:
    """Regions in the order of `find_regions`."""
    return [int(i) for i in np.argsort(-regions.peak_R, kind="stable")[:MOST_REGIONS]]


def connected(grid: Map, shape: tuple[int, int], threshold: float) -> Components:
    """Regions of a map as it is resized for them.

    A region's pixels reach ``OF_PEAK`` of its height and ``OF_NEARBY`` of the highest value nearby, both counted from
    the image's median; both are squares, as surprises grow with the square of a distance. A region that is too weak
    beside another for that is what reaches the threshold.
    """
    if not bool((grid >= threshold).any()):  # bilinear resizing never exceeds the grid's own values
        return components(np.zeros((1, 1), np.bool_), np.zeros((1, 1), np.float32))
    heat, level = _resized(grid, shape), float(np.median(grid))
    nearby = resize_map(_highest_nearby(grid), *heat.shape)
    wide = (heat >= level + OF_NEARBY * (nearby - level)) & (heat >= level + OF_PEAK * (threshold - level))
    regions = components(wide, heat)
    half = regions.painted(level + OF_PEAK * (regions.peak_R - level)).astype(np.float32)
    inside = wide & (heat >= half)
    core = components(heat >= threshold, heat)
    lost = np.ones(len(core.peak_R) + 1, np.bool_)
    lost[core.label_HW[inside]] = lost[0] = False
    regions = components(inside | lost[core.label_HW], heat)
    high = regions.peak_R >= threshold
    label_HW = regions.painted(np.cumsum(high) * high)
    return Components(label_HW, regions.area_R[high], regions.peak_R[high], regions.box_R4[high])


def region_mask(grid: Map, shape: tuple[int, int], threshold: float) -> Bools:
    """Pixels of all regions of a map, in the original image's height and width."""
    mask = connected(grid, shape, threshold).label_HW > 0
    if mask.shape == shape:
        return mask
    return np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST), dtype=np.bool_)


def outlines(regions: Components, region: int) -> list[NDArray[np.int64]]:
    """Outer outlines of a region along the edges of its pixels, clockwise: corners x, y (C x 2) each.

    Parts that touch by a corner have an outline each. Holes have none, as polygons of COCO cannot have holes.
    """
    top, left, bottom, right = regions.box_R4[region].tolist()
    mask = np.pad(regions.label_HW[top:bottom, left:right] == region + 1, 1)
    # Every edge between a pixel inside and one outside, as the corner it starts at and its direction: 0 right above
    # a pixel, 1 down beside it, 2 left below it, 3 up.
    ahead: dict[tuple[int, int], list[int]] = {}
    for way, (shift, axis, y, x) in enumerate(((1, 0, 0, 0), (-1, 1, 0, 1), (-1, 0, 1, 1), (1, 1, 1, 0))):
        for row, column in np.argwhere(mask & ~np.roll(mask, shift, axis)).tolist():
            ahead.setdefault((row + y, column + x), []).append(way)
    closed = []
    while ahead:
        (y, x), corners, before = next(iter(ahead)), list[tuple[int, int]](), -1
        start = (y, x)
        while (y, x) in ahead:
            ways = ahead[y, x]
            way = next((way for way in ways if way == (before + 1) % 4), ways[0])  # to the right: the same pixel's
            ways.remove(way)
            if not ways:
                del ahead[y, x]
            if way != before:
                corners.append((x + left - 1, y + top - 1))
            before, y, x = way, y + _DOWN[way], x + _RIGHT[way]
            if (y, x) == start:
                break
        outline = np.array(corners)
        beside = np.roll(outline, -1, axis=0)
        if (outline[:, 0] * beside[:, 1] - outline[:, 1] * beside[:, 0]).sum() > 0:  # anticlockwise is a hole
            closed.append(outline)
    return closed


def resize_map(grid: Map, height: int, width: int) -> Map:
    """Bilinear resize of a map to height x width."""
    image = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)


def _resized(grid: Map, shape: tuple[int, int]) -> Map:
    """In the image's own height and width, or smaller by one factor where that is above ``MOST_PIXELS``."""
    factor = max(1.0, math.sqrt(shape[0] * shape[1] / MOST_PIXELS))
    return resize_map(grid, max(1, round(shape[0] / factor)), max(1, round(shape[1] / factor)))


def _highest_nearby(grid: Map) -> Map:
    for axis in (0, 1):
        reach = round(NEARBY * grid.shape[axis])
        padded = np.pad(grid, [(reach, reach) if side == axis else (0, 0) for side in (0, 1)], mode="edge")
        grid = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=axis).max(-1)
    return grid
