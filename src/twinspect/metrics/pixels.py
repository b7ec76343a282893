"""Pixel metrics over any number of maps, in constant memory, with a proven bound on their error.

A ``ScoreHistogram`` keeps integer counts per score (see ``pages``), so that updates and merges commute: any order and
any number of parts end in the same bits. One pass over the bins, from the highest score down, gives every metric.

**Regions.** The per-region overlap of Bergmann et al. (MVTec AD, IJCV 2021) is linear in pixels: at any threshold it
is the mean over regions of (pixels found / region size), a sum in which every pixel of region r weighs
1 / (size_r * number of regions). The saturated overlap of MVTec LOCO (Bergmann et al., IJCV 2022) is the mean
of min(pixels found / saturation area, 1): only the highest-scoring ``saturation`` pixels of a region ever
count, each 1 / saturation. Both are thus ROC curves of weighted pixels: a histogram of weights is enough. A region's
whole weight is the integer ``UNIT``; its pixel of rank i gets floor((i+1) UNIT / s) - floor(i UNIT / s). Integers, so
sums do not depend on order, and the sum over any top part is within 2**-36 of the true fraction. The curve runs over
the false positive rate (pixels of good images and defect-free pixels of anomalous ones), is joined by straight lines
(a tie is a line), cut at the limit by linear interpolation, and the area is divided by the limit.

**Error.** While the counts fit (128 MiB by default) every bin is one float32 value and results are exact. Beyond
that a bin may hold different scores, and the true curve inside it can be any monotone path between the bin's two
corners. The reported value takes the tie (straight line); the bound is the larger distance to the two extreme
paths, summed over bins. It is a proof, not an estimate, and it is zero when no bin mixes scores. For scores spread
over a decade the default limit gives about 7 million bins and a bound of about 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from twinspect.errors import DataError
from twinspect.metrics.pages import CHUNK_PAGES, FINEST, Bins, MemoryBudget, PagedCounts, keys_of

UNIT = 1 << 36  # leaves room for 2**27 regions, and for regions of 2**27 pixels, in int64
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)

# Areas under a curve of regions: whether regions saturate, and the false positive rate at which the area ends.
REGION_METRICS: dict[str, tuple[Literal["pro", "spro"], float]] = {
    "aupro": ("pro", 0.3),
    "aupro_005": ("pro", 0.05),
    "auspro_005": ("spro", 0.05),
}
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", *REGION_METRICS)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Tables(NamedTuple):
    """Counts over scores: all pixels, defect pixels, weights of connected and of saturated regions."""

    all: PagedCounts
    positive: PagedCounts
    pro: PagedCounts
    spro: PagedCounts


class PixelTotals(NamedTuple):
    """Whole counts: pixels, defect pixels, connected regions, regions with a saturation area."""

    pixels: int = 0
    positives: int = 0
    regions: int = 0
    saturated: int = 0


def _sum(parts: Sequence[PixelTotals]) -> PixelTotals:
    return PixelTotals(*map(sum, zip(*parts, strict=True)))


class PixelSummary(NamedTuple):
    """Pixel metrics of one set of maps."""

    values: dict[str, float]  # by the names of ``PIXEL_METRICS``; nan where undefined
    bounds: dict[str, float]  # the most that each value can differ from the exact one; 0.0 means exact
    totals: PixelTotals

    @property
    def error_bound(self) -> float:
        """Largest of the bounds."""
        return max(self.bounds.values())


class ScoreHistogram:
    """Counts of pixel scores: normal, defect, and weighted by ground-truth region; a full budget coarsens them."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self.tables = Tables(*(PagedCounts(self.budget) for _ in Tables._fields))
        self.totals = PixelTotals()
        self.rounded = False

    def update(
        self,
        map_HW: ArrayLike,
        mask_HW: ArrayLike | None = None,
        name: str = "a map",
        regions: Sequence[tuple[ArrayLike, float]] | None = None,
    ) -> None:
        """Count one map; the arguments are those of `Evaluator.update`.

        Every one of ``regions`` is one region, whether connected or not, for sPRO only; their union is added to the
        mask. A saturation area above the region's size means the size. Where anything cannot be used, a DataError is
        raised and nothing is counted.
        """
        values, rounded = _as_map(map_HW, name)
        mask = np.zeros(values.shape, bool) if mask_HW is None else _as_mask(mask_HW, values.shape, name)
        places, areas = [], []  # flat positions of every given region that has some, and its saturation area
        for region_HW, area in regions or ():
            if not 0 < area < math.inf:
                raise DataError(f"saturation area of a region of {name} is {area}; accepted: pixels, above 0")
            region = _as_mask(region_HW, values.shape, name)
            mask = mask | region
            if region.any():
                places.append(np.flatnonzero(region))
                areas.append(max(1, min(len(places[-1]), int(area))))
        self.rounded |= rounded
        keys = keys_of(values)
        self.tables.all.add(keys)
        where, number, count = connected_regions(mask)
        if count:
            self.tables.positive.add(keys[where])
            self.tables.pro.add(*region_weights(keys[where], number))
        if places:
            numbers = np.repeat(np.arange(len(places)), [len(place) for place in places])
            self.tables.spro.add(*region_weights(keys[np.concatenate(places)], numbers, np.array(areas, np.int64)))
        self.totals = _sum([self.totals, PixelTotals(len(keys), len(where), count, len(places))])

    def merge(self, other: ScoreHistogram) -> None:
        """Add the counts of another histogram on a budget of the same limit, which stays as it is."""
        while self.budget.drop < other.budget.drop:
            self.budget.coarsen()
        for mine, theirs in zip(self.tables, other.tables, strict=True):
            for keys, counts in theirs.items():
                mine.add(keys, counts)
        self.totals = _sum([self.totals, other.totals])
        self.rounded |= other.rounded

    def compute(self) -> PixelSummary:
        """Metrics of everything counted so far, with error bounds."""
        return summarise([self])


def _as_map(map_HW: ArrayLike, who: str) -> tuple[NDArray[np.float32], bool]:
    """One score map as float32, and whether rounding may have made different scores equal.

    Rounding never swaps two scores; magnitudes above 3.4e38 become 3.4e38.
    """
    values = np.asarray(map_HW)
    if values.ndim != 2 or not values.size:
        raise DataError(f"score map of {who} has shape {values.shape}; accepted: (height, width), not empty")
    if values.dtype.kind not in "fiub":
        raise DataError(f"score map of {who} holds {values.dtype}; accepted: real numbers")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, col = bad[0]
        raise DataError(
            f"score map of {who} has {len(bad)} values that are not finite; the first is "
            f"{values[row, col]} at row {row}, column {col}"
        )
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.nan_to_num(values.astype(np.float32, copy=False))
    return narrow, bool((narrow != values).any())


def _as_mask(mask_HW: ArrayLike, shape: tuple[int, ...], who: str) -> Mask:
    mask = np.asarray(mask_HW)
    if mask.shape != shape:
        raise DataError(f"mask of {who} has shape {mask.shape}, its score map {shape}; they must be the same")
    if mask.dtype.kind not in "fiub":
        raise DataError(f"mask of {who} holds {mask.dtype}; accepted: bool or numbers (non-zero = defect)")
    return mask if mask.dtype == np.bool_ else mask != 0


# -------------------------------------------------------------------------------------------- regions


def connected_regions(mask_HW: Mask) -> tuple[NDArray[np.intp], NDArray[np.int64], int]:
    """8-connected regions: flat positions of the pixels, the region number (from 0) of each, and their number."""
    if not mask_HW.any():
        return np.zeros(0, np.intp), np.zeros(0, np.int64), 0
    rows, columns = ndimage.find_objects(mask_HW.astype(np.uint8))[0]  # most masks are small
    crop = mask_HW[rows, columns]
    labels, count = ndimage.label(crop, structure=_EIGHT_NEIGHBOURS)
    y, x = np.nonzero(crop)
    where = (y + rows.start) * mask_HW.shape[1] + x + columns.start
    return where, labels[y, x].astype(np.int64) - 1, int(count)


def region_weights(
    keys: Bins, number: NDArray[np.int64], areas: NDArray[np.int64] | None = None
) -> tuple[Bins, NDArray[np.int64]]:
    """Weight of every region pixel, by its rank from the top within its region.

    ``number`` is the region of each pixel, from 0; ``areas`` has the saturation area of each region, None means its
    size (plain PRO). Returns keys, sorted by region and score, and integer weights; each region sums to ``UNIT``.
    """
    packed = np.sort((number.astype(np.uint64) << np.uint64(32)) | keys)
    sizes = np.bincount(number)
    areas = sizes if areas is None else areas
    end, area = np.repeat(np.cumsum(sizes), sizes), np.repeat(areas, sizes)
    above = end - 1 - np.arange(len(packed))
    upper, lower = np.minimum(above + 1, area), np.minimum(above, area)
    return packed.astype(np.uint32), upper * UNIT // area - lower * UNIT // area


# ------------------------------------------------------------------------- one pass over all scores


class Bin(NamedTuple):
    """Columns over non-empty bins, scores descending: counts in the bin, and whether it may mix scores."""

    negative: Floats
    positive: Floats
    pro: Floats
    spro: Floats
    mixed: NDArray[np.bool_]


def _descending(histograms: Sequence[ScoreHistogram]) -> Iterator[Bin]:
    """Bins of the sum of several histograms on one budget, from the highest score down."""
    rounded, coarse = any(h.rounded for h in histograms), histograms[0].budget.drop > FINEST
    pages = np.unique(np.concatenate([h.tables.all.pages() for h in histograms]))[::-1]
    for start in range(0, len(pages), CHUNK_PAGES):
        part = pages[start : start + CHUNK_PAGES]
        counts = [sum(h.tables[i].rows(part) for h in histograms)[:, ::-1].ravel() for i in range(4)]  # type: ignore[index]
        full = np.flatnonzero(counts[0])
        everything, positive, pro, spro = (column[full].astype(np.float64) for column in counts)
        inside = full % 2 == 0  # a page ends with the inner part of a step, and it is read backwards
        yield Bin(everything - positive, positive, pro, spro, np.full(len(full), rounded) | (coarse & inside))


@dataclass
class _Area:
    """Area under (false positives, found weight) up to a false positive count."""

    column: Literal["positive", "pro", "spro"]
    limit: float
    whole: float
    weight_above: float = 0.0
    area: float = 0.0
    slack: float = 0.0

    def add(self, start: Floats, bins: Bin) -> None:
        """Add bins whose false positives start at ``start``; the last one counts only up to the limit."""
        weight: Floats = getattr(bins, self.column)
        end = self.weight_above + np.cumsum(weight)
        width = np.clip(self.limit - start, 0, bins.negative)
        share = width / np.maximum(bins.negative, 1)
        self.area += float(np.sum(width * (end - weight * (1 - share / 2))))
        self.slack += float(np.sum((width * weight * (1 - share / 2))[bins.mixed]))
        self.weight_above = float(end[-1])

    def result(self) -> tuple[float, float]:
        """Area and slack as fractions of the rectangle limit x whole weight; nan if that is empty."""
        full = self.limit * self.whole
        return (self.area / full, self.slack / full) if full else (math.nan, 0.0)


@dataclass
class _Precision:
    """Average precision and best F1, with their extremes inside mixed bins."""

    positives: int
    ap: float = 0.0
    slack: float = 0.0
    f1: float = 0.0
    f1_upper: float = 0.0

    def add(self, bins: Bin, tp: Floats, fp: Floats) -> None:
        """Add bins; ``tp`` and ``fp`` are counts at or above the bottom of each bin."""
        self.ap += float(np.sum(bins.positive * (tp / (tp + fp))))
        self.f1 = max(self.f1, float(np.max(2 * tp / (tp + fp + self.positives))))
        m = np.flatnonzero(bins.mixed & (bins.positive > 0) & (bins.negative > 0))
        if not len(m):
            return
        tp, fp, p, n = tp[m], fp[m], bins.positive[m], bins.negative[m]
        upper, value = tp / (tp + fp - n), tp / (tp + fp)
        # Worst order: negatives first. (TP+j) / (TP+j+FP) is concave in j: its mean is above its ends' mean.
        lower = (value + (tp - p + 1) / (tp - p + 1 + fp)) / 2
        self.slack += float(np.sum(p * np.maximum(upper - value, value - lower)))
        self.f1_upper = max(self.f1_upper, float(np.max(2 * tp / (tp + fp - n + self.positives))))


def summarise(histograms: Sequence[ScoreHistogram]) -> PixelSummary:
    """Pixel metrics of the sum of one or more histograms on the same budget."""
    totals = _sum([h.totals for h in histograms])
    negatives = totals.pixels - totals.positives
    weights = {"pro": totals.regions * UNIT, "spro": totals.saturated * UNIT}
    areas = {"pixel_auroc": _Area("positive", negatives, totals.positives)} | {
        name: _Area(column, limit * negatives, weights[column]) for name, (column, limit) in REGION_METRICS.items()
    }
    precision, tp, fp = _Precision(totals.positives), np.zeros(1), np.zeros(1)
    for bins in _descending(histograms):
        tp, fp = tp[-1] + np.cumsum(bins.positive), fp[-1] + np.cumsum(bins.negative)
        precision.add(bins, tp, fp)
        for area in (area for area in areas.values() if area.whole):
            area.add(fp - bins.negative, bins)
    results = {name: area.result() for name, area in areas.items()}
    results["pixel_ap"] = results["pixel_f1max"] = (math.nan, 0.0)
    if totals.positives and negatives:
        results["pixel_ap"] = (precision.ap / totals.positives, precision.slack / totals.positives)
        results["pixel_f1max"] = (precision.f1, max(precision.f1_upper - precision.f1, 0.0))
    return PixelSummary({n: v for n, (v, _) in results.items()}, {n: b for n, (_, b) in results.items()}, totals)
