"""Integer counts over the whole float32 number line, in bounded memory, independent of the order of arrival.

A score becomes an order-preserving 32-bit key. Counts live in pages of 256 bins that exist only where
scores fall, found through a two-step directory (12 + 12 bits). While everything fits, a bin is one float32
value and every result is exact. When the pages of all tables of a ``Budget`` would outgrow its limit, the
whole budget drops one low bit of the keys. Pages used at a resolution only ever grow with the data, so the
resolution reached is the finest one at which the union of the data fits: it cannot depend on order, on the
number of processes, or on how the work was cut.

A coarse step of the number line keeps two bins, not one: "exactly the lower edge" and "above it". Values with
few significant bits (0, 1, integers, 8-bit fractions of two) are where real ties pile up; they stay exact at
any resolution and so add nothing to the error bound.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Bins = NDArray[np.uint32]
Counts = NDArray[np.int64]

PAGE_BITS = 8
PAGE = 1 << PAGE_BITS
ROW_BITS = 12
ROW = 1 << ROW_BITS
PAGE_BYTES = PAGE * 8
ROW_BYTES = ROW * 4
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
    """Memory and resolution shared by several tables.

    Args:
        limit: bytes that all pages and directories together may use.
    """

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
        for table in self.tables:
            table.coarsen()
        self.drop += 1

    def fits(self, table: PagedCounts, pages: Bins) -> bool:
        """Whether new pages of a table fit. At the coarsest step (half a megabyte a table) everything does."""
        return self.drop >= COARSEST or self.used + table.cost(pages) <= self.limit


class PagedCounts:
    """One int64 per bin, in pages allocated where data falls.

    Args:
        budget: memory and resolution, shared with other tables.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        budget.tables.append(self)
        # Page 0 stays empty: the directory's "nothing here" points at it. Flat, so that it can grow in place
        # (realloc moves memory pages instead of copying, which keeps the peak near the limit).
        self._values = np.zeros(PAGE, np.int64)
        self._settle(np.zeros(0, np.uint32))

    def _settle(self, pages: Bins) -> None:
        """Make the directory anew, of pages that lie in this order."""
        self._pages: Bins = np.zeros(0, np.uint32)
        self._root = np.zeros(ROW, np.int32)
        self._leaf = np.zeros(ROW, np.int32)
        self._rows = 0
        self._allocate(pages)

    @property
    def nbytes(self) -> int:
        """Bytes of pages and directory rows."""
        return len(self._pages) * PAGE_BYTES + self._rows * ROW_BYTES

    def cost(self, pages: Bins) -> int:
        """Bytes that new pages would add."""
        rows = np.unique(pages >> np.uint32(ROW_BITS))
        return len(pages) * PAGE_BYTES + int((self._root[rows] == 0).sum()) * ROW_BYTES

    def add(self, keys: Bins, counts: Counts | int = 1) -> None:
        """Add counts (one per key, or one for all) at keys."""
        for start in range(0, len(keys), CHUNK_KEYS):
            part = slice(start, start + CHUNK_KEYS)
            bins, slot = self._admitted(keys[part])
            place = (slot << PAGE_BITS) + (bins & np.uint32(PAGE - 1))
            np.add.at(self._values, place, counts if isinstance(counts, int) else counts[part])

    def _admitted(self, keys: Bins) -> tuple[Bins, NDArray[np.int64]]:
        """Bins of keys, at the finest resolution at which all pages fit, and the place of each one's page."""
        while True:
            bins = bins_of(keys, self.budget.drop)
            slot = self._slots(bins >> np.uint32(PAGE_BITS))
            if slot.all():
                return bins, slot
            pages = np.unique(bins[slot == 0] >> np.uint32(PAGE_BITS))
            if self.budget.fits(self, pages):
                self._allocate(pages)
            else:
                self.budget.coarsen()

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
            yield edges_of(bins, self.budget.drop), counts[full]

    def coarsen(self) -> None:
        """Drop one low bit: of four bins the first stays alone, and two pages become one.

        In place: a copy of all counts beside them would be most of the memory that an evaluation takes.
        """
        values, order = self._values.reshape(-1, PAGE), np.argsort(self._pages)
        numbers = self._pages[order]
        parents, first = np.unique(numbers >> np.uint32(1), return_index=True)
        last = np.append(first[1:], len(order)) - 1  # the same page again where only one of the two is in use
        home = order[first] + 1
        for start in range(0, len(parents), CHUNK_PAGES):
            part = slice(start, start + CHUNK_PAGES)
            folded = np.zeros((len(home[part]), 2, PAGE // 2), np.int64)
            for child in (first[part], last[part]):
                quads = values[order[child] + 1].reshape(-1, PAGE // 4, 4)
                halves = np.stack((quads[:, :, 0], quads[:, :, 1:].sum(2)), axis=2).reshape(-1, PAGE // 2)
                folded[np.arange(len(child)), numbers[child] & np.uint32(1)] = halves
            values[home[part]] = folded.reshape(-1, PAGE)
        free, beyond = np.setdiff1d(np.arange(1, len(parents) + 1), home), np.flatnonzero(home > len(parents))
        for start in range(0, len(free), CHUNK_PAGES):
            part = slice(start, start + CHUNK_PAGES)
            values[free[part]] = values[home[beyond[part]]]
        home[beyond] = free
        del values
        self._values.resize((len(parents) + 1) * PAGE, refcheck=False)
        self._settle(parents[np.argsort(home)])

    def _slots(self, pages: Bins) -> NDArray[np.int64]:
        row = self._root.take(pages >> np.uint32(ROW_BITS), mode="clip")
        return self._leaf.take(row + (pages & np.uint32(ROW - 1)), mode="clip").astype(np.int64)

    def _allocate(self, new: Bins) -> None:
        slots = np.arange(len(self._pages) + 1, len(self._pages) + 1 + len(new))
        self._pages = np.concatenate((self._pages, new))
        high = new >> np.uint32(ROW_BITS)
        rows = np.unique(high)
        rows = rows[self._root[rows] == 0]
        self._root[rows] = np.arange(self._rows + 1, self._rows + 1 + len(rows)) * ROW
        self._rows += len(rows)
        self._leaf.resize((self._rows + 1) * ROW, refcheck=False)
        self._leaf[self._root[high] + (new & np.uint32(ROW - 1))] = slots
        if len(self._values) < (len(self._pages) + 1) * PAGE:
            # An eighth of slack, so that the number of reallocations stays logarithmic.
            self._values.resize((len(self._pages) + len(self._pages) // 8 + 17) * PAGE, refcheck=False)
