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


def scores_of(keys: Bins) -> NDArray[np.float32]:
    """Inverse of ``keys_of``."""
    sign = np.where(keys >> np.uint32(31), np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    return (keys ^ sign).view(np.float32)


def bins_of(keys: Bins, drop: int) -> Bins:
    """Bin numbers at a resolution: floor plus ceiling of key / 2**drop, so an exact edge has its own bin."""
    if drop == FINEST:
        return keys
    step = np.uint32(drop)
    return (keys >> step) + ((keys + np.uint32((1 << drop) - 1)) >> step)


def edges_of(bins: Bins, drop: int) -> Bins:
    """Lowest key of each bin."""
    return ((bins >> np.uint32(1)) << np.uint32(drop)) | (bins & np.uint32(1))


def fold(rows: Counts) -> Counts:
    """Pages n x 256 -> half pages n x 128 one resolution step on: of four bins, the first stays alone."""
    quads = rows.reshape(len(rows), PAGE // 4, 4)
    return np.stack((quads[:, :, 0], quads[:, :, 1:].sum(2)), axis=2).reshape(len(rows), PAGE // 2)


def coarser(pages: Bins, rows: Counts) -> tuple[Bins, Counts]:
    """One resolution step for a set of pages (sorted, unique) outside a table."""
    parents, which = np.unique(pages >> np.uint32(1), return_inverse=True)
    out = np.zeros((len(parents), 2, PAGE // 2), np.int64)
    out[which, pages & np.uint32(1)] = fold(rows)
    return parents, out.reshape(-1, PAGE)


class Budget:
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

    def admit(self, table: PagedCounts, pages: Bins) -> bool:
        """Whether new pages fit; if not, coarsen once and let the caller ask again with its new pages.

        At the coarsest step (16 of 32 key bits dropped, half a megabyte per table) everything is admitted.
        """
        if self.drop >= COARSEST or self.used + table.cost(pages) <= self.limit:
            return True
        self.coarsen()
        return False


class PagedCounts:
    """One int64 per bin, in pages allocated where data falls.

    Args:
        budget: memory and resolution, shared with other tables.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        budget.tables.append(self)
        self._pages: Bins = np.zeros(0, np.uint32)
        self._set_directory(self._pages)
        # Page 0 stays empty: the directory's "nothing here" points at it. Flat, so that it can grow in place
        # (realloc moves memory pages instead of copying, which keeps the peak at the limit).
        self._values = np.zeros(PAGE, np.int64)

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
            self._add_chunk(keys[part], counts if isinstance(counts, int) else counts[part])

    def _add_chunk(self, keys: Bins, counts: Counts | int) -> None:
        while True:
            bins = bins_of(keys, self.budget.drop)
            slot = self._slots(bins >> np.uint32(PAGE_BITS))
            if slot.all():
                break
            pages = np.unique(bins[slot == 0] >> np.uint32(PAGE_BITS))
            if self.budget.admit(self, pages):
                self._allocate(pages)
        np.add.at(self._values, (slot << PAGE_BITS) + (bins & np.uint32(PAGE - 1)), counts)

    def add_pages(self, pages: Bins, rows: Counts, drop: int) -> None:
        """Add whole pages (sorted, unique) that are at resolution ``drop``, not coarser than this table."""
        while True:
            for _ in range(self.budget.drop - drop):
                pages, rows = coarser(pages, rows)
            drop = self.budget.drop
            slot = self._slots(pages)
            new = pages[slot == 0]
            if not len(new):
                break
            if self.budget.admit(self, new):
                self._allocate(new)
        view = self._values.reshape(-1, PAGE)
        view[slot] += rows

    def pages(self) -> Bins:
        """Numbers of the pages in use, ascending."""
        return np.sort(self._pages)

    def rows(self, pages: Bins) -> Counts:
        """Counts of the given pages, n x 256; zeros for a page that is not in use."""
        return self._values.reshape(-1, PAGE)[self._slots(pages)]

    def chunks(self) -> Iterator[tuple[Bins, Counts]]:
        """All pages in ascending order, some at a time."""
        pages = self.pages()
        for start in range(0, len(pages), CHUNK_PAGES):
            part = pages[start : start + CHUNK_PAGES]
            yield part, self.rows(part)

    def _slots(self, pages: Bins) -> NDArray[np.int64]:
        row = self._root.take(pages >> np.uint32(ROW_BITS), mode="clip")
        return self._leaf.take(row + (pages & np.uint32(ROW - 1)), mode="clip").astype(np.int64)

    def _allocate(self, new: Bins) -> None:
        first = len(self._pages) + 1
        self._pages = np.concatenate((self._pages, new))
        self._enter(new, np.arange(first, first + len(new)))
        if len(self._values) < (len(self._pages) + 1) * PAGE:
            # An eighth of slack, so that the number of reallocations stays logarithmic.
            self._resize(len(self._pages) + len(self._pages) // 8 + 16)

    def _resize(self, pages: int) -> None:
        self._values.resize((pages + 1) * PAGE, refcheck=False)

    def _set_directory(self, pages: Bins) -> None:
        self._root = np.zeros(ROW, np.int32)
        self._leaf = np.zeros(ROW, np.int32)
        self._rows = 0
        self._pages = pages
        self._enter(pages, np.arange(1, len(pages) + 1))

    def _enter(self, pages: Bins, slots: NDArray[np.int64]) -> None:
        high = pages >> np.uint32(ROW_BITS)
        rows = np.unique(high)
        rows = rows[self._root[rows] == 0]
        self._root[rows] = np.arange(self._rows + 1, self._rows + 1 + len(rows)) * ROW
        self._rows += len(rows)
        self._leaf.resize((self._rows + 1) * ROW, refcheck=False)
        self._leaf[self._root[high] + (pages & np.uint32(ROW - 1))] = slots

    def coarsen(self) -> None:
        """Drop one low bit, in place: pairs of pages fold into the slot of the first; holes are closed."""
        order = np.argsort(self._pages)
        pages, slots = self._pages[order], order + 1
        parents, first, which = np.unique(pages >> np.uint32(1), return_index=True, return_inverse=True)
        target = slots[first]
        self._fold_into(slots, target[which], pages & np.uint32(1))
        self._close_holes(target)
        ordered = np.empty_like(parents)
        ordered[target - 1] = parents
        self._set_directory(ordered)
        self._resize(len(parents))

    def _fold_into(self, slots: NDArray[np.int64], target: NDArray[np.int64], half: Bins) -> None:
        # Pages come in ascending order: the first of a pair is read before its slot is written, and the slot
        # of the second is never a target, so chunks can be any size.
        view = self._values.reshape(-1, PAGE)
        halves = self._values.reshape(-1, 2, PAGE // 2)
        for start in range(0, len(slots), CHUNK_PAGES):
            part = slice(start, start + CHUNK_PAGES)
            folded = fold(view[slots[part]])
            view[slots[part]] = 0
            halves[target[part], half[part]] = folded

    def _close_holes(self, target: NDArray[np.int64]) -> None:
        count = len(target)
        moving = np.flatnonzero(target > count)
        free = np.setdiff1d(np.arange(1, count + 1), target)
        view = self._values.reshape(-1, PAGE)
        for start in range(0, len(moving), CHUNK_PAGES):
            part = slice(start, start + CHUNK_PAGES)
            view[free[part]] = view[target[moving[part]]]
        target[moving] = free
