"""Pixel metrics over any number of maps, in constant memory, with a proven bound on their error.

A ``ScoreHistogram`` keeps integer counts per score, so that updates and merges commute: any order and any number of
parts end in the same bits. One pass over the bins, from the highest score down, gives every metric.

**Bins.** A score becomes an order-preserving 32-bit key. Counts live in pages of 256 bins that exist only where
scores fall, found through a two-step directory (12 + 12 bits). While everything fits, a bin is one float32 value
and every result is exact. When the pages of all tables of a ``MemoryBudget`` would outgrow its limit, the whole
budget drops one low bit of the keys. Pages only ever grow with the data, so the resolution reached is the finest at
which the union of the data fits: it cannot depend on order, on the number of processes, or on how the work was cut.
A coarse step keeps two bins: "exactly the lower edge" and "above it". Values with few significant bits (0, 1,
integers, 8-bit fractions of two) are where real ties pile up; they stay exact at any resolution and so add nothing
to the error bound.

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

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from twinspect.errors import DataError

PAGE_BITS = 8
PAGE = 1 << PAGE_BITS
ROW_BITS = 12
ROW = 1 << ROW_BITS
CHUNK_KEYS = 1 << 18
CHUNK_PAGES = 1 << 10
FINEST, COARSEST = 1, 17  # low bits of a key that are dropped

UNIT = 1 << 36  # leaves room for 2**27 regions, and for regions of 2**27 pixels, in int64
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)

# Areas under a curve of regions: whether regions saturate, and the false positive rate at which the area ends.
REGION_METRICS: dict[str, tuple[Literal["pro", "spro"], float]] = {
    "aupro": ("pro", 0.3),
    "aupro_005": ("pro", 0.05),
    "auspro_005": ("spro", 0.05),
}
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", *REGION_METRICS)

Bins = NDArray[np.uint32]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


# --------------------------------------------------------------------------- counts by score


def keys_of(scores: NDArray[np.float32]) -> Bins:
    """Order-preserving integer image of finite float32 values, flattened; -0.0 and 0.0 share a key."""
    bits = (scores.ravel() + np.float32(0)).view(np.uint32)
    sign = (bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(0x80000000)
    return bits ^ sign


def bins_of(keys: Bins, drop: int) -> Bins:
    """Bin numbers at a resolution: floor plus ceiling of key / 2**drop, so an exact edge has its own bin."""
    if drop == FINEST:
        return keys
    step = np.uint32(drop)
    return (keys >> step) + ((keys + np.uint32((1 << drop) - 1)) >> step)


def edges_of(bins: Bins, drop: int) -> Bins:
    """Lowest key of each bin."""
    return ((bins >> np.uint32(1)) << np.uint32(drop)) | (bins & np.uint32(1))


class MemoryBudget:
    """Resolution shared by several tables, and the bytes that all their pages and directories may use."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.drop = FINEST
        self.tables: list[PagedCounts] = []

    @property
    def used(self) -> int:
        """Bytes in use: a function of the data alone, not of allocation history."""
        return sum(table.nbytes for table in self.tables)

    def coarsen(self) -> None:
        """Drop one more low bit in every table."""
        self.drop += 1
        for table in self.tables:
            table.coarsen(self.drop)


class PagedCounts:
    """One int64 per bin, in pages allocated where data falls."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        budget.tables.append(self)
        self._empty(budget.drop)

    def _empty(self, drop: int) -> None:
        self.drop = drop
        self._pages: Bins = np.zeros(0, np.uint32)
        self._root = np.zeros(ROW, np.int32)
        self._leaf = np.zeros(ROW, np.int32)
        # Page 0 stays empty: the directory's "nothing here" points at it. Flat, so that it can grow in place
        # (realloc moves memory pages instead of copying, which keeps the peak near the limit).
        self._values = np.zeros(PAGE, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of pages and directory rows."""
        return len(self._pages) * PAGE * 8 + (len(self._leaf) - ROW) * 4

    def add(self, keys: Bins, counts: Counts | int = 1) -> None:
        """Add counts (one per key, or one for all) at keys; the budget is coarsened until all pages fit."""
        for start in range(0, len(keys), CHUNK_KEYS):
            part = slice(start, start + CHUNK_KEYS)
            while True:
                bins = bins_of(keys[part], self.drop)
                slots = self._slots(bins >> np.uint32(PAGE_BITS))
                new = np.unique(bins[slots == 0] >> np.uint32(PAGE_BITS))
                rows = np.unique(new >> np.uint32(ROW_BITS))
                cost = len(new) * PAGE * 8 + int((self._root[rows] == 0).sum()) * ROW * 4
                # At the coarsest step (half a megabyte a table) everything fits.
                if not len(new) or self.drop == COARSEST or self.budget.used + cost <= self.budget.limit:
                    break
                self.budget.coarsen()
            if len(new):
                self._allocate(new)
                slots = self._slots(bins >> np.uint32(PAGE_BITS))
            place = (slots << PAGE_BITS) + (bins & np.uint32(PAGE - 1))
            np.add.at(self._values, place, counts if isinstance(counts, int) else counts[part])

    def pages(self) -> Bins:
        """Numbers of the pages in use, ascending."""
        return np.sort(self._pages)

    def rows(self, pages: Bins) -> Counts:
        """Counts of the given pages, n x 256; zeros for a page that is not in use."""
        return self._values.reshape(-1, PAGE)[self._slots(pages)]

    def items(self) -> Iterator[tuple[Bins, Counts]]:
        """Lowest keys of the bins that are not empty, ascending, and their counts, some at a time."""
        pages = self.pages()
        for start in range(0, len(pages), CHUNK_PAGES):
            part = pages[start : start + CHUNK_PAGES]
            counts = self.rows(part).ravel()
            full = np.flatnonzero(counts)
            bins = (part[full >> PAGE_BITS] << np.uint32(PAGE_BITS)) | (full & (PAGE - 1)).astype(np.uint32)
            yield edges_of(bins, self.drop), counts[full]

    def coarsen(self, drop: int) -> None:
        """Count everything again with fewer bits."""
        before = copy.copy(self)  # holds the old arrays
        self._empty(drop)
        for keys, counts in before.items():
            self.add(keys, counts)

    def _slots(self, pages: Bins) -> NDArray[np.int64]:
        """Places of pages in the values; 0 for one that is not in use."""
        row = self._root.take(pages >> np.uint32(ROW_BITS), mode="clip")
        return self._leaf.take(row + (pages & np.uint32(ROW - 1)), mode="clip").astype(np.int64)

    def _allocate(self, new: Bins) -> None:
        slots = np.arange(len(self._pages) + 1, len(self._pages) + 1 + len(new))
        self._pages = np.concatenate((self._pages, new))
        high = new >> np.uint32(ROW_BITS)
        rows = np.unique(high)
        rows = rows[self._root[rows] == 0]
        self._root[rows] = len(self._leaf) + np.arange(len(rows)) * ROW
        self._leaf.resize(len(self._leaf) + len(rows) * ROW, refcheck=False)
        self._leaf[self._root[high] + (new & np.uint32(ROW - 1))] = slots
        if len(self._values) < (len(self._pages) + 1) * PAGE:
            # An eighth of slack, so that the number of reallocations stays logarithmic.
            self._values.resize((len(self._pages) + len(self._pages) // 8 + 17) * PAGE, refcheck=False)


# -------------------------------------------------------------------------- counts of pixels


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
        values = _as_map(map_HW, name)
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


def _as_map(map_HW: ArrayLike, who: str) -> NDArray[np.float32]:
    """One score map as float32: scores are compared at that precision; magnitudes above 3.4e38 become 3.4e38."""
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
        return np.nan_to_num(values.astype(np.float32, copy=False))


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
    coarse = histograms[0].budget.drop > FINEST
    pages = np.unique(np.concatenate([h.tables.all.pages() for h in histograms]))[::-1]
    for start in range(0, len(pages), CHUNK_PAGES):
        part = pages[start : start + CHUNK_PAGES]
        counts = [sum(h.tables[i].rows(part) for h in histograms)[:, ::-1].ravel() for i in range(4)]  # type: ignore[index]
        full = np.flatnonzero(counts[0])
        everything, positive, pro, spro = (column[full].astype(np.float64) for column in counts)
        mixed = coarse & (full % 2 == 0)  # a page ends with the inner part of a step, and it is read backwards
        yield Bin(everything - positive, positive, pro, spro, mixed)


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
