"""Vectors of items that a dense head has never met: those of a bundle, and of what came while it was served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genretrieval.servable import Catalogue

# A share of all items from which on it is faster to multiply all than to gather those that are asked for.
_MANY = 1 / 4
# Products that are kept at a time, in numbers.
_KEPT = 1 << 22
# Of more items with a prefix, so many are taken, evenly from all; a mean of more is hardly another one.
_RELATIVES = 64


@dataclass(frozen=True, slots=True)
class ItemVectors:
    """Vectors by item row.

    Attributes:
        of_bundle: float32 ``[n, E]``, of the items that the bundle was exported with; may be memory-mapped.
        of_later: float32 ``[m, E]``, of those that came after.
    """

    of_bundle: NDArray[np.float32]
    of_later: NDArray[np.float32]

    @classmethod
    def open(cls, of_bundle: NDArray[np.float32]) -> ItemVectors:
        """Those of a bundle alone."""
        return cls(of_bundle, np.empty((0, of_bundle.shape[1]), np.float32))

    def __len__(self) -> int:
        """Items that have one."""
        return len(self.of_bundle) + len(self.of_later)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors of item rows of any shape, float32 ``[*rows.shape, E]``."""
        later = rows >= len(self.of_bundle)
        if not later.any():
            return self.of_bundle[rows]
        vectors = self.of_bundle[np.where(later, 0, rows)]
        vectors[later] = self.of_later[rows[later] - len(self.of_bundle)]
        return vectors

    def products(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of `vectors` ``[n, E]`` and all of these, float32 ``[n, len(self)]``; these are read once for all."""
        products: NDArray[np.float32] = vectors @ self.of_bundle.T
        return np.hstack([products, vectors @ self.of_later.T]) if len(self.of_later) else products

    def with_later(self, relatives: list[NDArray[np.int64]]) -> ItemVectors:
        """Each later item has the mean vector of its relatives, see `relatives_of`."""
        means: list[NDArray[Any]] = [self.of_bundle[rows].mean(axis=0) for rows in relatives]
        return ItemVectors(self.of_bundle, np.asarray(means, np.float32).reshape(len(means), -1))


class Products:
    """What the vectors of a batch of searches make with those of items.

    Where much of all items is asked for, all are multiplied, and are read from memory once for several searches.
    """

    def __init__(self, items: ItemVectors, searches: NDArray[np.float32]) -> None:
        """Of `items` and `searches`, float32 ``[B, E]``."""
        self._items = items
        self._searches = searches
        self._together = max(1, _KEPT // max(1, len(items)))
        self._first = -1
        self._kept = np.empty((0, 0), np.float32)

    def of(self, search: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of one search and some items, float32 ``[len(rows)]``."""
        if len(rows) < len(self._items) * _MANY:
            few: NDArray[np.float32] = self._items[rows] @ self._searches[search]
            return few
        first = search - search % self._together
        if first != self._first:
            self._kept = self._items.products(self._searches[first : first + self._together])
            self._first = first
        products: NDArray[np.float32] = self._kept[search - first, rows]
        return products


def relatives_of(catalogue: Catalogue, n_bundle: int) -> list[NDArray[np.int64]]:
    """Of each item that came after the first `n_bundle`: those of the bundle that share most of its semantic ID.

    They are all, or an even choice, of the items below the deepest node on its way that has any. So the vector of an
    item depends on the bundle and its ID alone, and on nothing that came before it.
    """
    index = catalogue.index
    ways = index.ancestors(index.item_leaves[n_bundle:])
    n_later = len(catalogue.item_ids) - n_bundle
    found: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * n_later
    left = np.arange(n_later)
    for level in range(index.n_levels - 1, -2, -1):
        nodes = ways[level][left] if level >= 0 else np.zeros(len(left), np.int64)
        for node in np.unique(nodes).tolist():
            below = _items_below(catalogue, level, node)
            below = below[below < n_bundle]
            if len(below):
                chosen = below[np.linspace(0, len(below) - 1, min(len(below), _RELATIVES)).astype(np.int64)]
                for row in left[nodes == node].tolist():
                    found[row] = chosen
        left = np.asarray([row for row in left.tolist() if not len(found[row])], np.int64)
        if not len(left):
            break
    return found


def _items_below(catalogue: Catalogue, level: int, node: int) -> NDArray[np.int32]:
    """Item rows under a node of a level; -1 is the level of the root."""
    first, end = node, node + 1
    for starts in catalogue.index.child_starts[level + 1 :]:
        first, end = int(starts[first]), int(starts[end])
    return catalogue.index.items_under(np.arange(first, end))[0]
