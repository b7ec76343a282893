"""Pixel metrics over any number of maps, in constant memory; histograms of parts can be merged.

A ``ScoreHistogram`` keeps integer counts per score (see ``pages``), so updates and merges commute: any order
and any number of parts end in the same bits. Results come from one sweep over the bins (see ``sweep``)
and carry their own error bound.

Why the error stays below 1e-4: while the pages fit (128 MiB by default: any 7,000 different
scores, tens of millions if they lie close together) every bin is one float32 value and results are exact.
Beyond that, the bound is computed from the counts, as in ``sweep``, and returned with the value. For scores
spread over a decade the default limit gives about 7 million bins: about 1e-6. Data made to break this
(most pixels inside one bin, and millions of different scores elsewhere) shows in the bound, never in silence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinspect.errors import DataError
from twinspect.metrics.components import Region, connected_regions, given_regions, region_weights
from twinspect.metrics.pages import Bins, Budget, PagedCounts, keys_of
from twinspect.metrics.sweep import PixelSummary, Tables, Totals, summarise

MEMORY_LIMIT = 128 << 20
FPR_LIMITS = (0.3, 0.05)

Mask = NDArray[np.bool_]


def as_map(map_HW: ArrayLike, who: str) -> tuple[NDArray[np.float32], bool]:
    """Check one score map and bring it to float32.

    Args:
        map_HW: H x W numbers of any range, higher means more anomalous. float64 and integers are rounded to
            the nearest float32, which never swaps two scores; magnitudes above 3.4e38 become 3.4e38.
        who: name of the image for error messages.

    Returns:
        The map, and whether rounding may have made different scores equal.

    Raises:
        DataError: not two-dimensional, not numbers, empty, or not finite (names image and first place).
    """
    values = np.asarray(map_HW)
    if values.ndim != 2 or not values.size:
        raise DataError(f"score map of {who} has shape {values.shape}; accepted: (height, width), not empty")
    if values.dtype.kind not in "fiub":
        raise DataError(f"score map of {who} holds {values.dtype}; accepted: real numbers")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))
        row, col = bad[0]
        raise DataError(
            f"score map of {who} has {len(bad)} values that are not finite; the first is "
            f"{values[row, col]} at row {row}, column {col}"
        )
    return _to_float32(values)


def _to_float32(values: NDArray[np.generic]) -> tuple[NDArray[np.float32], bool]:
    if values.dtype.kind != "f":
        small = values.size == 0 or (int(values.max()) <= 1 << 24 and int(values.min()) >= -(1 << 24))
        return values.astype(np.float32), not small
    if values.dtype.itemsize <= 4:
        return values.astype(np.float32, copy=False), False
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.nan_to_num(values.astype(np.float32))
    return narrow, not np.array_equal(narrow.astype(values.dtype), values)


def as_mask(mask_HW: ArrayLike, shape: tuple[int, ...], who: str) -> Mask:
    """Check one ground-truth mask: H x W, non-zero means defect, the same size as the map.

    Raises:
        DataError: another shape than the map's, or not numbers.
    """
    mask = np.asarray(mask_HW)
    if mask.shape != shape:
        raise DataError(f"mask of {who} has shape {mask.shape}, its score map {shape}; they must be the same")
    if mask.dtype.kind not in "fiub":
        raise DataError(f"mask of {who} holds {mask.dtype}; accepted: bool or numbers (non-zero = defect)")
    return mask if mask.dtype == np.bool_ else mask != 0


class ScoreHistogram:
    """Counts of pixel scores: normal, defect, and weighted by ground-truth region.

    Args:
        memory_limit: bytes that the counts may use; reaching it makes the bins coarser, never fails.
        budget: memory shared with other histograms instead of ``memory_limit``.
    """

    def __init__(self, memory_limit: int = MEMORY_LIMIT, budget: Budget | None = None) -> None:
        self.budget = budget or Budget(memory_limit)
        self.tables = Tables(*(PagedCounts(self.budget) for _ in Tables._fields))
        self.totals = Totals()
        self.maps = 0
        self.rounded = False

    @property
    def nbytes(self) -> int:
        """Bytes of counts held."""
        return sum(table.nbytes for table in self.tables)

    @property
    def exact(self) -> bool:
        """Whether every bin is a single score, so that all results are exact."""
        return self.budget.drop == 1 and not self.rounded

    def update(
        self,
        map_HW: ArrayLike,
        mask_HW: ArrayLike | None = None,
        name: str = "",
        regions: Sequence[tuple[ArrayLike, float]] | None = None,
    ) -> None:
        """Count one map.

        Args:
            map_HW: H x W finite scores of any range, higher means more anomalous.
            mask_HW: H x W, non-zero means defect; None means no defect pixel (except those of ``regions``).
            name: image name for error messages.
            regions: (mask H x W, saturation area in pixels) of every annotated region, for sPRO only; their
                union is added to the mask.

        Raises:
            DataError: see ``as_map`` and ``as_mask``; nothing is counted then.
        """
        who = name or f"map number {self.maps}"
        values, rounded = as_map(map_HW, who)
        given = [(as_mask(m, values.shape, who), _as_area(area, who)) for m, area in regions or ()]
        mask = None if mask_HW is None else as_mask(mask_HW, values.shape, who)
        for region, _ in given:
            mask = region if mask is None else mask | region
        self.rounded |= rounded
        self.maps += 1
        self._count(keys_of(values), mask, given)

    def _count(self, keys: Bins, mask: Mask | None, given: Sequence[Region]) -> None:
        self.tables.all.add(keys)
        positives = regions = 0
        if mask is not None and mask.any():
            where, number, regions = connected_regions(mask)
            positives = len(where)
            self.tables.positive.add(keys[where])
            self.tables.pro.add(*region_weights(keys[where], number))
        where, number, areas = given_regions(given)
        if len(areas):
            self.tables.spro.add(*region_weights(keys[where], number, areas))
        self._add_totals(Totals(len(keys), positives, regions, len(areas)))

    def _add_totals(self, more: Totals) -> None:
        self.totals = Totals(*(a + b for a, b in zip(self.totals, more, strict=True)))

    def merge(self, other: ScoreHistogram) -> None:
        """Add the counts of another histogram, which stays as it is.

        Raises:
            DataError: the other one has a different memory limit, so its resolution means something else.
        """
        if other.budget.limit != self.budget.limit:
            raise DataError(
                f"cannot merge histograms with memory limits {self.budget.limit} and {other.budget.limit}"
            )
        while self.budget.drop < other.budget.drop:
            self.budget.coarsen()
        for mine, theirs in zip(self.tables, other.tables, strict=True):
            drop = other.budget.drop
            for pages, rows in theirs.chunks():
                mine.add_pages(pages, rows, drop)
        self._add_totals(other.totals)
        self.maps += other.maps
        self.rounded |= other.rounded

    def compute(self, fpr_limits: Sequence[float] = FPR_LIMITS) -> PixelSummary:
        """Metrics of everything counted so far, with error bounds.

        Args:
            fpr_limits: false positive rates at which AUPRO and AU-sPRO end, each in (0, 1].
        """
        return summarise([self.tables], self.totals, fpr_limits, self.rounded)


def _as_area(area: float, who: str) -> float:
    if not np.isfinite(area) or area <= 0:
        raise DataError(f"saturation area of a region of {who} is {area}; accepted: pixels, above 0")
    return area
