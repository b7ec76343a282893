"""Connected regions of an anomaly map: boxes in original pixels, masks, outlines. No torch.

Whether there is a region is decided by a threshold, which comes from the map maxima of good images, so that the
promise is per image: at most the stated share of good images shows any region at all. An image that is called bad by
its score shows its strongest place in any case (`strongest_place`). How far a region reaches is
decided by the map's own heights: at one threshold for all, a strong defect would be a blot and a weak one a dot. The
shares for that were chosen on masks of six classes (docs/results.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.decide.decision import Floats, p_values

Map = NDArray[np.float32]
Bools = NDArray[np.bool_]
OF_PEAK = 0.5**2  # of a lobe's height above the image's level, that all its pixels reach; see `connected`
OF_NEARBY = 0.6**2  # of the highest value nearby (above the level), that they reach as well
STRONG = 0.75**2  # of the same, that strong pixels reach
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

    label_HW: NDArray[np.int32]
    area_R: NDArray[np.int64]
    peak_R: NDArray[np.float64]
    box_R4: NDArray[np.int64]


def components(mask_HW: Bools, values_HW: Map, threshold: float = -math.inf) -> Components:
    """Regions of ``mask_HW`` whose highest value reaches a threshold, and what is known of each."""
    pixel_P, region_P = _labelled(mask_HW)
    peak_R = _highest(values_HW.ravel()[pixel_P], region_P)
    high = peak_R >= threshold
    number_R = np.cumsum(high) - 1
    pixel_P, region_P = pixel_P[high[region_P]], number_R[region_P[high[region_P]]]
    label_HW = np.zeros(mask_HW.shape, np.int32)
    label_HW.ravel()[pixel_P] = region_P + 1
    box_R4 = np.zeros((int(high.sum()), 4), np.int64)
    box_R4[:, :2] = mask_HW.shape
    for axis, place_P in enumerate(np.divmod(pixel_P, mask_HW.shape[1])):
        np.minimum.at(box_R4[:, axis], region_P, place_P)
        np.maximum.at(box_R4[:, axis + 2], region_P, place_P + 1)
    return Components(label_HW, np.bincount(region_P, minlength=len(box_R4)), peak_R[high], box_R4)


def _labelled(mask_HW: Bools) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pixels of a mask as places in the flat image, in reading order, and the region of each."""
    width = mask_HW.shape[1] + 1  # a column without pixels keeps the end of a row from the start of the next
    flat = np.pad(mask_HW, ((0, 0), (0, 1))).ravel()
    edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=np.int8(0)))
    start, stop = edges[::2], edges[1::2]  # horizontal runs of pixels
    # Runs of the row above that touch a run, also by a corner, follow each other.
    first, last = np.searchsorted(stop, start - width), np.searchsorted(start, stop - width, "right")
    touching = np.maximum(last - first, 0)
    below = np.repeat(np.arange(len(start)), touching)
    above = np.arange(len(below)) + np.repeat(first - (np.cumsum(touching) - touching), touching)
    root = np.arange(len(start))
    while (root[below] != root[above]).any():
        high, low = np.maximum(root[below], root[above]), np.minimum(root[below], root[above])
        np.minimum.at(root, high, low)
        while (root != root[root]).any():
            root = root[root]
    region = np.unique(root, return_inverse=True)[1]
    pixels = np.flatnonzero(flat)
    return pixels - pixels // width, np.repeat(region, stop - start)


def _highest(value_P: Map, region_P: NDArray[np.int64]) -> NDArray[np.float64]:
    peak_R = np.full(int(region_P.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(peak_R, region_P, value_P)
    return peak_R


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
    return level + STRONG * (peak - level) if peak > level else math.inf


def strongest(regions: Components) -> list[int]:
    """Regions in the order of `find_regions`."""
    return [int(i) for i in np.argsort(-regions.peak_R, kind="stable")[:MOST_REGIONS]]


def connected(grid: Map, shape: tuple[int, int], threshold: float) -> Components:
    """Regions of a map as it is resized for them.

    A lobe is connected pixels that reach ``OF_PEAK`` of its height and ``OF_NEARBY`` of what is highest nearby. Both
    count from the image's median and are squares, as surprises grow with the square of a distance. A map is blurred,
    which makes small defects grow most: a blot has a small share of strong pixels, a plateau a large one. A region is
    the highest pixels of a lobe: as many as are strong, times their share. A lobe whose highest pixel is not strong
    is the flank of another. What is too weak beside another for all that is a region where it reaches the threshold.
    """
    if not bool((grid >= threshold).any()):  # bilinear resizing never exceeds the grid's own values
        return components(np.zeros((1, 1), np.bool_), np.zeros((1, 1), np.float32))
    heat, level = _resized(grid, shape), float(np.median(grid))
    nearby = resize_map(_highest_nearby(grid), *heat.shape)
    wide = (heat >= level + OF_NEARBY * (nearby - level)) & (heat >= level + OF_PEAK * (threshold - level))
    pixel_P, region_P = _labelled(wide)
    value_P, inside = heat.ravel()[pixel_P], np.zeros(heat.size, np.bool_)
    half_R = (level + OF_PEAK * (_highest(value_P, region_P) - level)).astype(np.float32)
    inside[pixel_P[value_P >= half_R[region_P]]] = True
    pixel_P, lobe_P = _labelled(inside.reshape(heat.shape))
    inside[pixel_P] = _highest_pixels(heat.ravel()[pixel_P] - level, nearby.ravel()[pixel_P] - level, lobe_P)
    pixel_P, region_P = _labelled(heat >= threshold)
    lost_R = np.ones(int(region_P.max(initial=-1)) + 1, np.bool_)
    lost_R[region_P[inside[pixel_P]]] = False
    inside[pixel_P[lost_R[region_P]]] = True
    return components(inside.reshape(heat.shape), heat, threshold)


def _highest_pixels(value_P: Map, nearby_P: Map, lobe_P: NDArray[np.int64]) -> Bools:
    """Which pixels of each lobe are its region; ``nearby_P`` is what is highest near each. Both above the level."""
    order, size_L, strong_P = np.lexsort((-value_P, lobe_P)), np.bincount(lobe_P), value_P >= STRONG * nearby_P
    first_L = np.cumsum(size_L) - size_L
    share_L = np.bincount(lobe_P, strong_P) / size_L
    last_L = first_L + np.maximum(np.rint(share_L**2 * size_L).astype(np.int64), 1) - 1
    least_L = np.where(strong_P[order[first_L]], value_P[order[last_L]], np.inf)
    kept_P: Bools = value_P >= least_L[lobe_P]
    return kept_P


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
