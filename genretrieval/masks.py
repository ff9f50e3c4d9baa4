"""Which leaves a search may write: masks in preallocated rows that the retrieval graph takes whole."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genretrieval.catalogue import Allowed
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
    """

    filters: Filters | None = None
    open: tuple[int, ...] = ()
    within: NDArray[np.int64] | None = None

    @property
    def everything(self) -> bool:
        """Whether it is the mask of row 0."""
        return self.filters is None and not self.open and self.within is None

    @property
    def key(self) -> tuple[str, tuple[int, ...], int]:
        """Equal for equal masks, as long as `within` lives: an array is told by its identity."""
        return canonical_filters(self.filters) if self.filters else "", self.open, id(self.within)


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
        self._free = list(range(n_rows - 1, 0, -1))
        # With each row its mask: the array that its key names by identity must not be freed before the key.
        self._rows: OrderedDict[tuple[str, tuple[int, ...], int], tuple[int, Mask]] = OrderedDict()
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
                matching, allowed = self._lift(mask)
                while (row := self._take_row()) is None:
                    self._changed.wait()
                for level, nodes in enumerate(allowed):
                    self.arrays[f"allowed_{level}"][row, : len(nodes)] = nodes
                self.items[row] = matching
                self._rows[key] = row, mask
            self._rows.move_to_end(key)
            row = self._rows[key][0]
            self._holders[row] += 1
            return row

    def _lift(self, mask: Mask) -> tuple[NDArray[np.bool_], Allowed]:
        """Items that a mask lets through, and the nodes of every level that lead to them or to an open keyword."""
        index = self.catalogue.index
        matching = self.items[0] if mask.filters is None else self.catalogue.matching(mask.filters)
        if mask.within is not None:
            inside = np.zeros_like(matching)
            inside[mask.within] = True
            matching = matching & inside
        leaves = index.allowed_leaves(matching)
        leaves[index.keyword_leaves[list(mask.open)]] = True
        return matching, index.allowed_nodes(leaves)

    def _take_row(self) -> int | None:
        """A row that nobody holds: a fresh one, else the least recently used."""
        if self._free:
            return self._free.pop()
        for key, (row, _) in self._rows.items():
            if not self._holders[row]:
                del self._rows[key]
                return row
        return None
