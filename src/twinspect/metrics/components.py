"""Ground-truth regions and the integer weight each of their pixels carries.

The per-region overlap of Bergmann et al. (MVTec AD, IJCV 2021) is linear in pixels: at any threshold it is
the mean over regions of (pixels found / region size), a sum in which every pixel of region r weighs
1 / (size_r * number of regions). The saturated overlap of MVTec LOCO (Bergmann et al., IJCV 2022) is the mean
of min(pixels found / saturation area, 1): only the highest-scoring ``saturation`` pixels of a region ever
count, each 1 / saturation. Both are thus ROC curves of weighted pixels: a histogram of weights is enough.

A region's whole weight is the integer ``UNIT``; its pixel of rank i gets floor((i+1) UNIT / s) -
floor(i UNIT / s). Integers, so sums do not depend on order, and the sum over any top part is within 2**-36 of
the true fraction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

UNIT = 1 << 36  # leaves room for 2**27 regions, and for regions of 2**27 pixels, in int64
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)

Region = tuple[NDArray[np.bool_], float]


def connected_regions(mask_HW: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.int64], int]:
    """8-connected regions of a mask.

    Returns:
        Flat positions of the defect pixels, the region number (from 0) of each, and the number of regions.
    """
    rows, cols = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    if not len(rows):
        return np.zeros(0, np.intp), np.zeros(0, np.int64), 0
    top, left = rows[0], cols[0]
    crop = mask_HW[top : rows[-1] + 1, left : cols[-1] + 1]
    labels, count = ndimage.label(crop, structure=EIGHT_NEIGHBOURS)
    y, x = np.nonzero(crop)
    return (y + top) * mask_HW.shape[1] + x + left, labels[y, x].astype(np.int64) - 1, int(count)


def given_regions(
    regions: Sequence[Region],
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
    """Regions given as (mask H x W, saturation area in pixels), one region per mask, connected or not.

    A saturation area above the region's size means the size, as in the evaluation of MVTec LOCO. Empty masks
    are left out.

    Returns:
        Flat positions of the region pixels, the region number of each, the saturation area of every region.
    """
    flat = [(np.flatnonzero(mask), area) for mask, area in regions]
    flat = [(pixels, area) for pixels, area in flat if len(pixels)]
    pixels = np.concatenate([p for p, _ in flat]) if flat else np.zeros(0, np.intp)
    number = np.repeat(np.arange(len(flat)), [len(p) for p, _ in flat])
    areas = [max(1, min(len(p), int(area))) for p, area in flat]
    return pixels, number, np.array(areas, np.int64)


def region_weights(
    keys: NDArray[np.uint32], number: NDArray[np.int64], areas: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Weight of every region pixel, by its rank from the top within its region.

    Args:
        keys: ordered keys of the pixels' scores.
        number: region of each pixel, from 0.
        areas: saturation area per region; None means the region's size (plain PRO).

    Returns:
        Keys, sorted by region and score, and their integer weights; each region sums to ``UNIT``.
    """
    packed = np.sort((number.astype(np.uint64) << np.uint64(32)) | keys)
    sizes = np.bincount(number)
    areas = sizes if areas is None else areas
    end, area = np.repeat(np.cumsum(sizes), sizes), np.repeat(areas, sizes)
    above = end - 1 - np.arange(len(packed))
    upper, lower = np.minimum(above + 1, area), np.minimum(above, area)
    return packed.astype(np.uint32), upper * UNIT // area - lower * UNIT // area
