"""AUPRO and AU-sPRO of a whole set of maps, over all thresholds.

Definitions: PRO curve, Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021; sPRO curve,
Bergmann et al., "Beyond Dents and Scratches", IJCV 2022. The false positive rate runs over the pixels of good
images and the defect-free pixels of anomalous ones. The curve is joined by straight lines (a tie is a line),
cut at the limit by linear interpolation, and the area is divided by the limit.

How a pixel gets its weight is in ``components``; how the area is summed is in ``sweep``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from numpy.typing import ArrayLike

from twinspect.errors import DataError
from twinspect.metrics.stream import ScoreHistogram

SPRO_LIMIT = 0.05


def check_limit(limit: float) -> float:
    """Return the false positive rate limit if it lies in (0, 1].

    Raises:
        DataError: it does not.
    """
    if not 0 < limit <= 1:
        raise DataError(f"false positive rate limit is {limit}; accepted: above 0, at most 1 (usual: 0.3)")
    return limit


def aupro(maps: Iterable[ArrayLike], masks: Iterable[ArrayLike | None], limit: float = 0.3) -> float:
    """Area under the per-region overlap curve, 0 to 1; nan without a region or without a normal pixel.

    Args:
        maps: H x W score maps; sizes may differ.
        masks: one H x W mask per map, non-zero means defect; None for a good image.
        limit: false positive rate at which the curve ends.

    Raises:
        DataError: a limit outside (0, 1], or a map or mask that cannot be used.
    """
    check_limit(limit)
    histogram = ScoreHistogram()
    for map_HW, mask_HW in zip(maps, masks, strict=True):
        histogram.update(map_HW, mask_HW)
    return histogram.compute((limit,)).values[f"aupro@{limit:g}"]


def auspro(
    maps: Iterable[ArrayLike],
    regions: Iterable[Sequence[tuple[ArrayLike, float]]],
    limit: float = SPRO_LIMIT,
) -> float:
    """Area under the saturated per-region overlap curve, 0 to 1; nan without a region or a normal pixel.

    Args:
        maps: H x W score maps; sizes may differ.
        regions: for every map its (mask H x W, saturation area in pixels) pairs, each one region whether
            connected or not; empty for a good image. An area above the region's size means the size.
        limit: false positive rate at which the curve ends.

    Raises:
        DataError: a limit outside (0, 1], or a map, mask or area that cannot be used.
    """
    check_limit(limit)
    histogram = ScoreHistogram()
    for map_HW, pairs in zip(maps, regions, strict=True):
        histogram.update(map_HW, regions=pairs)
    return histogram.compute((limit,)).values[f"auspro@{limit:g}"]
