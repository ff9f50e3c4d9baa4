"""Which leaves a search may write: masks in preallocated rows that the retrieval graph takes whole."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genretrieval.candidates import Rows, contains
from genretrieval.catalogue import NOTHING_CLOSED, Closed, runs
from genretrieval.request import Filters
from genretrieval.servable import Catalogue

Key = tuple[str, tuple[int, ...], tuple[int, ...] | None, int]

# Row 0 is the mask of everything: 32 searches of one batch may have 32 different masks.
MASK_ROWS = 33
# A share of the items up to which a mask is written by following each of them; above, whole levels at once are faster.
_FEW = 0.01
# A share of the items up to which each is looked up as a bit; above, unpacking all bits of a row is faster.
_SINGLE = 1 / 64


@dataclass(frozen=True, slots=True)
class Mask:
    """What one search may write; without anything, every item.

    Attributes:
        filters: that items must satisfy.
        open: keyword leaves, by their place in `CatalogueIndex.keyword_leaves`; the others are closed.
        within: sets of int64 item rows; only what is in one of them may be written. None for all items.
        without: int64, item rows that may not be written; None for none. They would use up the beams of the others.
    """

    filters: Filters | None = None
    open: tuple[int, ...] = ()
    within: tuple[NDArray[np.int64], ...] | None = None
    without: NDArray[np.int64] | None = None

    @property
    def everything(self) -> bool:
        """Whether it is the mask of row 0."""
        return self.filters is None and not self.open and self.within is None and self.without is None

    @property
    def key(self) -> Key:
        """Equal for equal masks, as long as its arrays live: they are told by their identity."""
        within = None if self.within is None else tuple(map(id, self.within))
        return canonical_filters(self.filters) if self.filters else "", self.open, within, id(self.without)


def canonical_filters(filters: Filters) -> str:
    """The same text for equal filters; mappings have no order, and gRPC does not keep one."""
    return filters.model_copy(update={"attributes": dict(sorted(filters.attributes.items()))}).model_dump_json()


class MaskRows:
    """Distinct masks in preallocated rows, which the graph takes whole; row 0 allows every item that is not gone.

    A row is not reused while a batch holds it. When all rows are held, a batch with a new mask waits. It takes memory
    when its first mask is written.
    """

    def __init__(self, catalogue: Catalogue, n_rows: int = MASK_ROWS) -> None:
        """Allocate ``n_rows`` rows for every level of the index (`arrays`) and for its items, a bit for each."""
        self.catalogue = catalogue
        self.n_rows = n_rows
        widths = [max(2, len(tokens)) for tokens in catalogue.index.tokens]
        self.arrays = {f"allowed_{level}": np.empty((n_rows, width), bool) for level, width in enumerate(widths)}
        self._items = np.empty((n_rows, (catalogue.index.n_items + 7) // 8), np.uint8)
        self._write(0, Mask(), None)
        self._free = list(range(n_rows - 1, 0, -1))
        # With each row its mask: an array that its key names by identity must not be freed before the key.
        self._rows: OrderedDict[Key, tuple[int, Mask]] = OrderedDict()
        self._holders = [0] * n_rows
        self._changed = threading.Condition()
        # Batches take their rows one after another, so that no two half-served ones wait for each other.
        self._turn = threading.Lock()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: one for each node of the index, and one for eight items."""
        return sum(array.shape[1] for array in self.arrays.values()) + self._items.shape[1]

    @contextmanager
    def hold(self, masks: Sequence[Mask]) -> Iterator[list[int]]:
        """Rows of the masks of a batch, fewer than `n_rows` distinct ones, held until the block ends."""
        rows: list[int] = []
        try:
            with self._turn:
                # One by one: what was acquired is released below even if a later mask is refused.
                for mask in masks:
                    rows.append(0 if mask.everything else self._acquire(mask))  # noqa: PERF401
            yield rows
        finally:
            with self._changed:
                for row in rows:
                    self._holders[row] -= 1 if row else 0
                self._changed.notify()

    def lets(self, row: int, items: Rows, excluded: Rows) -> NDArray[np.bool_]:
        """Which of `items` the mask of a row lets through and are not among `excluded`, bool ``[len(items)]``.

        Args:
            row: one that is held.
            items: int64 or int32, item rows.
            excluded: item rows, sorted.
        """
        if not row and not len(self.catalogue.gone):
            return ~contains(excluded, items)
        if len(items) > len(self.catalogue.item_ids) * _SINGLE:
            allowed: NDArray[np.bool_] = np.unpackbits(self._items[row], bitorder="little").view(bool)
            allowed[excluded] = False
            return allowed[items]
        bits = self._items[row, items >> 3] >> (items & 7).astype(np.uint8)
        allowed = (bits & 1).astype(bool)
        allowed &= ~contains(excluded, items)
        return allowed

    def closed(self, row: int, excluded: Rows) -> tuple[Closed, ...]:
        """What a search by the mask of a row must not enter besides, where a request excludes a few items.

        A leaf closes when all of its items that the mask lets through are excluded, a node with its last open child.

        Args:
            row: one that is held.
            excluded: item rows, sorted, each once.

        Returns:
            Level l: see `genretrieval.catalogue.closed_inputs`.
        """
        if not len(excluded):
            return (NOTHING_CLOSED,) * self.catalogue.index.n_levels
        index = self.catalogue.index
        leaves = np.sort(index.item_leaves[excluded])
        first, n_excluded = runs(leaves)
        leaves = leaves[first].astype(np.int64)
        emptied = n_excluded == index.leaf_sizes(leaves)
        every = not row and not len(self.catalogue.gone) and not len(index.keyword_leaves)
        if not every:
            # What is left of a leaf may be what the mask does not let through.
            shared = np.flatnonzero(~emptied)
            items, of_leaf = index.items_under(leaves[shared])
            left = np.bincount(of_leaf[self.lets(row, items, excluded)], minlength=len(shared))
            emptied[shared] = left == 0
        return index.closed_with(leaves[emptied], None if every else self._nodes(row))

    def _nodes(self, row: int) -> list[NDArray[np.bool_]]:
        return [array[row] for array in self.arrays.values()]

    def _acquire(self, mask: Mask) -> int:
        key = mask.key
        with self._changed:
            if key not in self._rows:
                # Whatever takes long or is refused comes before a row is taken.
                filtered = None if mask.filters is None else self.catalogue.matching(mask.filters)
                while (row := self._take_row()) is None:
                    self._changed.wait()
                self._write(row, mask, filtered)
                self._rows[key] = row, mask
            self._rows.move_to_end(key)
            row = self._rows[key][0]
            self._holders[row] += 1
            return row

    def _write(self, row: int, mask: Mask, filtered: NDArray[np.bool_] | None) -> None:
        """Fill a row: the items that a mask lets through, and the nodes of every level on the way to them.

        Where it lets few items through, or leaves few out, only the way to those is followed.
        """
        index, n = self.catalogue.index, self.catalogue.index.n_items
        items = np.ones(n, bool) if filtered is None else filtered.copy()
        if mask.within is not None:
            inside = np.zeros(n, bool)
            for rows in mask.within:
                inside[rows] = True
            items &= inside
        for left_out in (self.catalogue.gone, mask.without):
            if left_out is not None:
                items[left_out] = False
        self._items[row] = np.packbits(items, bitorder="little")
        n_left, nodes = int(np.count_nonzero(items)), self._nodes(row)
        if n_left <= _FEW * n:
            for of_level, way in zip(nodes, index.ancestors(index.item_leaves[items]), strict=True):
                of_level[:] = False
                of_level[way] = True
        elif n - n_left <= _FEW * n:
            for of_level in nodes:
                of_level[:] = True
            leaves = np.union1d(index.item_leaves[~items], index.keyword_leaves)
            under, of_leaf = index.items_under(leaves)
            emptied = leaves[np.bincount(of_leaf[items[under]], minlength=len(leaves)) == 0]
            for of_level, closed in zip(nodes, index.closed_with(emptied, nodes), strict=True):
                of_level[closed.nodes] = False
        else:
            for of_level, allowed in zip(nodes, index.allowed_nodes(index.allowed_leaves(items)), strict=True):
                of_level[: len(allowed)] = allowed
        for of_level, way in zip(nodes, index.ancestors(index.keyword_leaves[list(mask.open)]), strict=True):
            of_level[way] = True
        # Whoever keeps a copy of an array, on a device of its own, knows by its identity that it is still the same.
        self.arrays = {name: array.view() for name, array in self.arrays.items()}

    def _take_row(self) -> int | None:
        """A row that nobody holds: a fresh one, else the least recently used."""
        if self._free:
            return self._free.pop()
        for key, (row, _) in self._rows.items():
            if not self._holders[row]:
                del self._rows[key]
                return row
        return None
