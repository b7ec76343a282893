"""One pass from the highest score bin down: every pixel metric, and how far each can be from exact.

Where a bin may hold different scores, the true curve inside it can be any monotone path between the bin's two
corners. The reported value takes the tie (straight line); the bound is the larger distance to the two extreme
paths, summed over bins. It is a proof, not an estimate, and it is zero when no bin mixes scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinspect.metrics.components import UNIT
from twinspect.metrics.pages import CHUNK_PAGES, PAGE, PAGE_BITS, Bins, PagedCounts, edges_of, scores_of

Floats = NDArray[np.float64]


class Tables(NamedTuple):
    """Counts over scores: all pixels, defect pixels, weights of connected and of saturated regions."""

    all: PagedCounts
    positive: PagedCounts
    pro: PagedCounts
    spro: PagedCounts


class Totals(NamedTuple):
    """Whole counts: pixels, defect pixels, connected regions, regions with a saturation area."""

    pixels: int = 0
    positives: int = 0
    regions: int = 0
    saturated: int = 0


@dataclass(frozen=True, slots=True)
class PixelSummary:
    """Pixel metrics of one set of maps.

    Attributes:
        values: ``auroc``, ``ap``, ``f1max``, ``threshold`` (a pixel is predicted defect where score >= it),
            ``aupro@LIMIT`` and ``auspro@LIMIT``; nan where undefined.
        bounds: for every metric, the most that the value can differ from the exact one; 0.0 means exact.
        totals: what was counted.
    """

    values: dict[str, float]
    bounds: dict[str, float]
    totals: Totals

    @property
    def error_bound(self) -> float:
        """Largest of the bounds."""
        return max(self.bounds.values(), default=0.0)


class Bin(NamedTuple):
    """Columns over non-empty bins, scores descending: counts in the bin, and whether it may mix scores."""

    score: NDArray[np.float32]
    negative: Floats
    positive: Floats
    pro: Floats
    spro: Floats
    mixed: NDArray[np.bool_]


def descending(tables: Sequence[Tables], rounded: bool) -> Iterator[Bin]:
    """Bins of the sum of several sets of tables on one budget, from the highest score down."""
    drop = tables[0].all.budget.drop
    pages = np.unique(np.concatenate([t.all.pages() for t in tables]))[::-1]
    for start in range(0, len(pages), CHUNK_PAGES):
        part = pages[start : start + CHUNK_PAGES]
        counts = [sum(t[i].rows(part) for t in tables)[:, ::-1].ravel() for i in range(4)]  # type: ignore[index]
        full = np.flatnonzero(counts[0])
        bins: Bins = ((part[full >> PAGE_BITS] + np.uint32(1)) << np.uint32(PAGE_BITS)) - np.uint32(1)
        bins -= (full & (PAGE - 1)).astype(np.uint32)
        everything, positive, pro, spro = (c[full].astype(np.float64) for c in counts)
        mixed = np.full(len(bins), rounded) | ((bins & np.uint32(1)).astype(bool) & (drop > 1))
        yield Bin(scores_of(edges_of(bins, drop)), everything - positive, positive, pro, spro, mixed)


@dataclass
class Area:
    """Area under (false positives, found weight) up to a false positive count."""

    limit: float
    found: float = 0.0
    area: float = 0.0
    slack: float = 0.0

    def add(self, start: Floats, negative: Floats, weight: Floats, mixed: NDArray[np.bool_]) -> None:
        """Add bins whose false positives start at ``start``; the last one counts only up to the limit."""
        end = self.found + np.cumsum(weight)
        width = np.clip(self.limit - start, 0, negative)
        share = width / np.maximum(negative, 1)
        self.area += float(np.sum(width * (end - weight * (1 - share / 2))))
        self.slack += float(np.sum((width * weight * (1 - share / 2))[mixed]))
        if len(end):
            self.found = float(end[-1])


@dataclass
class Precision:
    """Average precision and best F1, with their extremes inside mixed bins."""

    positives: int
    ap: float = 0.0
    slack: float = 0.0
    f1: float = 0.0
    f1_upper: float = 0.0
    threshold: float = math.nan

    def add(self, b: Bin, tp: Floats, fp: Floats) -> None:
        """Add bins; ``tp`` and ``fp`` are counts at or above the bottom of each bin."""
        precision = tp / (tp + fp)
        self.ap += float(np.sum(b.positive * precision))
        f1 = 2 * tp / (tp + fp + self.positives)
        best = int(np.argmax(f1))
        if f1[best] > self.f1:
            self.f1, self.threshold = float(f1[best]), float(b.score[best])
        self._widen(b, tp, fp)

    def _widen(self, b: Bin, tp: Floats, fp: Floats) -> None:
        m = np.flatnonzero(b.mixed & (b.positive > 0) & (b.negative > 0))
        if not len(m):
            return
        tp, fp, p, n = tp[m], fp[m], b.positive[m], b.negative[m]
        upper, value = tp / (tp + fp - n), tp / (tp + fp)
        # Worst order: negatives first. (TP+j) / (TP+j+FP) is concave in j: its mean is above its ends' mean.
        lower = (value + (tp - p + 1) / (tp - p + 1 + fp)) / 2
        self.slack += float(np.sum(p * np.maximum(upper - value, value - lower)))
        self.f1_upper = max(self.f1_upper, float(np.max(2 * tp / (tp + fp - n + self.positives))))


@dataclass
class Sweep:
    """State of the pass."""

    totals: Totals
    limits: tuple[float, ...]
    tp: float = 0.0
    fp: float = 0.0
    roc: Area = field(init=False)
    precision: Precision = field(init=False)
    pro: list[Area] = field(init=False)
    spro: list[Area] = field(init=False)

    def __post_init__(self) -> None:
        negatives = self.totals.pixels - self.totals.positives
        self.roc = Area(float(negatives))
        self.precision = Precision(self.totals.positives)
        self.pro = [Area(limit * negatives) for limit in self.limits]
        self.spro = [Area(limit * negatives) for limit in self.limits]

    def add(self, b: Bin) -> None:
        """Add bins in descending order of score."""
        tp, fp = self.tp + np.cumsum(b.positive), self.fp + np.cumsum(b.negative)
        start = fp - b.negative
        self.roc.add(start, b.negative, b.positive, b.mixed)
        self.precision.add(b, tp, fp)
        for area in self.pro if self.totals.regions else ():
            area.add(start, b.negative, b.pro, b.mixed)
        for area in self.spro if self.totals.saturated else ():
            area.add(start, b.negative, b.spro, b.mixed)
        self.tp, self.fp = float(tp[-1]), float(fp[-1])

    def summary(self) -> PixelSummary:
        """Values and bounds."""
        t, p = self.totals, self.precision
        both = t.positives and t.pixels - t.positives
        out = {
            "auroc": _normal(self.roc, t.positives),
            "ap": (p.ap / t.positives, p.slack / t.positives) if both else (math.nan, 0.0),
            "f1max": (p.f1, max(p.f1_upper - p.f1, 0.0)) if both else (math.nan, 0.0),
        }
        for limit, pro, spro in zip(self.limits, self.pro, self.spro, strict=True):
            out[f"aupro@{limit:g}"] = _normal(pro, t.regions * UNIT)
            out[f"auspro@{limit:g}"] = _normal(spro, t.saturated * UNIT)
        values = {name: value for name, (value, _) in out.items()}
        values["threshold"] = p.threshold if both else math.nan
        return PixelSummary(values, {name: bound for name, (_, bound) in out.items()}, t)


def _normal(area: Area, weight: float) -> tuple[float, float]:
    """Area and slack as fractions of the rectangle limit x weight; nan if that is empty."""
    whole = area.limit * weight
    return (area.area / whole, area.slack / whole) if whole else (math.nan, 0.0)


def summarise(tables: Sequence[Tables], totals: Totals, limits: Sequence[float], rounded: bool) -> PixelSummary:
    """Pixel metrics of the sum of several sets of tables.

    Args:
        tables: one or more sets on the same budget.
        totals: their summed totals.
        limits: false positive rates at which the areas under PRO and sPRO end, each in (0, 1].
        rounded: whether scores were rounded to float32, so that any bin may mix scores.
    """
    sweep = Sweep(totals, tuple(limits))
    for b in descending(tables, rounded):
        sweep.add(b)
    return sweep.summary()
