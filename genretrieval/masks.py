"""Which leaves a search may write: masks in preallocated rows that the retrieval graph takes whole."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genretrieval.request import Filters
from genretrieval.servable import Catalogue

# Row 0 is always open: 32 searches of one batch may have 32 different masks.
MASK_ROWS = 33


@dataclass(frozen=True, slots=True)
class Mask:
    """What one search may write; without anything, every item.

    Attributes:
        filters: that items must satisfy.
        open: keyword leaves, by their place in `CatalogueIndex.keyword_leaves`; the others are closed.
        within: int64, the only item rows that may be written; None for all.
        without: int64, item rows that may not be written; None for none. They would use up the beams of the others.
    """

    filters: Filters | None = None
    open: tuple[int, ...] = ()
    within: NDArray[np.int64] | None = None
    without: NDArray[np.int64] | None = None

    @property
    def everything(self) -> bool:
        """Whether it is the mask of row 0."""
        return self.filters is None and not self.open and self.within is None and self.without is None

    @property
    def key(self) -> tuple[str, tuple[int, ...], int, int]:
        """Equal for equal masks, as long as its arrays live: they are told by their identity."""
        return canonical_filters(self.filters) if self.filters else "", self.open, id(self.within), id(self.without)


def canonical_filters(filters: Filters) -> str:
    """The same text for equal filters; mappings have no order, and gRPC does not keep one."""
    return filters.model_copy(update={"attributes": dict(sorted(filters.attributes.items()))}).model_dump_json()


class MaskRows:
    """Distinct masks in preallocated rows, which the graph takes whole; row 0 allows every item.

    A row is not reused while a batch holds it. When all rows are held, a batch with a new mask waits.
    """

    def __init__(self, catalogue: Catalogue, n_rows: int = MASK_ROWS) -> None:
        """Allocate ``n_rows`` rows for every level of the index (`arrays`) and for its items (`items`)."""
        self.catalogue = catalogue
        self.n_rows = n_rows
        widths = [max(2, len(tokens)) for tokens in catalogue.index.tokens]
        self.arrays = {f"allowed_{level}": np.ones((n_rows, width), bool) for level, width in enumerate(widths)}
        self.items = np.ones((n_rows, len(catalogue.table)), bool)
        if len(catalogue.index.keyword_leaves):
            every = catalogue.index.allowed_nodes(catalogue.index.allowed_leaves(self.items[0]))
            for level, nodes in enumerate(every):
                self.arrays[f"allowed_{level}"][0, : len(nodes)] = nodes
        self._item_leaves = catalogue.index.item_leaves() if len(catalogue.index.keyword_leaves) else None
        self._free = list(range(n_rows - 1, 0, -1))
        # With each row its mask: an array that its key names by identity must not be freed before the key.
        self._rows: OrderedDict[tuple[str, tuple[int, ...], int, int], tuple[int, Mask]] = OrderedDict()
        self._holders = [0] * n_rows
        self._changed = threading.Condition()
        # Batches take their rows one after another, so that no two half-served ones wait for each other.
        self._turn = threading.Lock()

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

        A keyword's items and its leaf are few, so that without filters only the way to them is written.
        """
        index, items = self.catalogue.index, self.items[row]
        nodes = [self.arrays[f"allowed_{level}"][row] for level in range(index.n_levels)]
        if mask.within is None:
            items[:] = True if filtered is None else filtered
        else:
            items[:] = False
            items[mask.within] = True if filtered is None else filtered[mask.within]
        if mask.without is not None:
            items[mask.without] = False
        if mask.within is not None and self._item_leaves is not None:
            for of_level, way in zip(nodes, index.ancestors(self._item_leaves[np.flatnonzero(items)]), strict=True):
                of_level[:] = False
                of_level[way] = True
        elif filtered is None and mask.within is None and mask.without is None:
            for level, of_level in enumerate(nodes):
                of_level[:] = self.arrays[f"allowed_{level}"][0]
        else:
            for of_level, allowed in zip(nodes, index.allowed_nodes(index.allowed_leaves(items)), strict=True):
                of_level[: len(allowed)] = allowed
        for of_level, way in zip(nodes, index.ancestors(index.keyword_leaves[list(mask.open)]), strict=True):
            of_level[way] = True

    def _take_row(self) -> int | None:
        """A row that nobody holds: a fresh one, else the least recently used."""
        if self._free:
            return self._free.pop()
        for key, (row, _) in self._rows.items():
            if not self._holders[row]:
                del self._rows[key]
                return row
        return None
