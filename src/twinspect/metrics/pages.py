"""Integer counts over the whole float32 number line, in bounded memory, independent of the order of arrival.

A score becomes an order-preserving 32-bit key. Counts live in pages of 256 bins that exist only where scores fall,
found through a two-step directory (12 + 12 bits). While everything fits, a bin is one float32 value and every result
is exact. When the pages of all tables of a ``MemoryBudget`` would outgrow its limit, the whole budget drops one low
bit of the keys. Pages used at a resolution only ever grow with the data, so the resolution reached is the finest at
which the union of the data fits: it cannot depend on order, on the number of processes, or on how the work was cut.

A coarse step of the number line keeps two bins, not one: "exactly the lower edge" and "above it". Values with
few significant bits (0, 1, integers, 8-bit fractions of two) are where real ties pile up; they stay exact at
any resolution and so add nothing to the error bound.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Bins = NDArray[np.uint32]
Counts = NDArray[np.int64]

PAGE_BITS = 8
PAGE = 1 << PAGE_BITS
ROW_BITS = 12
ROW = 1 << ROW_BITS
CHUNK_KEYS = 1 << 18
CHUNK_PAGES = 1 << 10
FINEST = 1
COARSEST = 17


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
