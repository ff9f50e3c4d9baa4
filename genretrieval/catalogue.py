"""The catalogue index: which codes may follow which, for every item that exists, as flat arrays.

Level-wise CSR over the sorted code table. Level l has one node for every distinct prefix of l + 1 codes; nodes of a
level are numbered in sorted order, so the children of a node are a contiguous range of the next level and a child's
node id is simply its position there: no next-state column. Nodes of the last level are leaves; a leaf holds one item
or, where semantic IDs collide, several. A keyword leaf, the path of a reserved slot alone, holds none: what it stands
for is bound while the catalogue is served, and differs from request to request.

What a request may see (stock, filters, deletions, closed keyword leaves) is one mechanism, a mask over leaves, which
`allowed_nodes` lifts to every level so that a beam never enters a subtree in which nothing is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import SemanticIds

Nodes = NDArray[np.int64]
Allowed = tuple[NDArray[np.bool_], ...]


@dataclass(frozen=True, slots=True)
class CatalogueIndex:
    """An immutable snapshot of the trie over semantic IDs.

    Attributes:
        codebook_sizes: codes of each level.
        tokens: level l: int64 ``[n_nodes_l]``, the code that each node adds to its parent's prefix.
        child_starts: level l: int64 ``[n_nodes_(l-1) + 1]``; node p of the level above has the children
            ``[child_starts[l][p], child_starts[l][p + 1])``. Level 0 hangs under one root.
        leaf_starts: int64 ``[n_leaves + 1]``, where each leaf's items lie in `leaf_items`.
        leaf_items: int32 ``[n_items]``, item rows, leaf after leaf, in the order they are to be listed.
        keyword_leaves: int64 ``[n_reserved]``, the leaf of each reserved slot, in the order of `reserved_paths`.
    """

    codebook_sizes: tuple[int, ...]
    tokens: tuple[Nodes, ...]
    child_starts: tuple[Nodes, ...]
    leaf_starts: Nodes
    leaf_items: NDArray[np.int32]
    keyword_leaves: Nodes

    @property
    def n_levels(self) -> int:
        """Codes of a semantic ID."""
        return len(self.tokens)

    @property
    def n_leaves(self) -> int:
        """Distinct semantic IDs."""
        return len(self.tokens[-1])

    @property
    def n_items(self) -> int:
        """Items of the catalogue."""
        return len(self.leaf_items)

    @property
    def max_children(self) -> tuple[int, ...]:
        """Largest number of children of any node above each level; what a search step has to look at."""
        return tuple(int(np.diff(starts).max()) for starts in self.child_starts)

    def item_nodes(self) -> Nodes:
        """int64 ``[n_items, n_levels]``: the path of every item row, as node ids."""
        return self.paths(self.item_leaves())

    def paths(self, leaves: Nodes) -> Nodes:
        """int64 ``[len(leaves), n_levels]``: the path to each leaf, as node ids."""
        parents = [np.repeat(np.arange(len(s) - 1), np.diff(s)) for s in self.child_starts]
        path = np.empty((len(leaves), self.n_levels), np.int64)
        path[:, -1] = leaves
        for level in range(self.n_levels - 1, 0, -1):
            path[:, level - 1] = parents[level][path[:, level]]
        return path

    def ancestors(self, leaves: Nodes) -> tuple[Nodes, ...]:
        """Level l: int64, node ids on the way to each of `leaves`; quick for few of them, as `paths` is for all."""
        levels = [np.asarray(leaves, np.int64)]
        for starts in reversed(self.child_starts[1:]):
            levels.append(np.searchsorted(starts, levels[-1], side="right") - 1)
        return tuple(reversed(levels))

    def item_leaves(self) -> Nodes:
        """int64 ``[n_items]``: the leaf of every item row."""
        leaves = np.empty(self.n_items, np.int64)
        leaves[self.leaf_items] = np.repeat(np.arange(self.n_leaves), np.diff(self.leaf_starts))
        return leaves

    def leaf_codes(self, leaves: Nodes) -> NDArray[np.int32]:
        """int32 ``[len(leaves), n_levels]``: the semantic IDs of `leaves`."""
        codes = np.empty((len(leaves), self.n_levels), np.int32)
        for level, nodes in enumerate(self.ancestors(leaves)):
            codes[:, level] = self.tokens[level][nodes]
        return codes

    def items_of(self, leaf: int) -> NDArray[np.int32]:
        """Item rows under `leaf`, in listing order."""
        return self.leaf_items[self.leaf_starts[leaf] : self.leaf_starts[leaf + 1]]

    def allowed_leaves(self, allowed_items: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Bool ``[n_leaves]``: leaves that hold at least one allowed item (``allowed_items`` is ``[n_items]``)."""
        held = np.concatenate([[0], np.cumsum(allowed_items[self.leaf_items])])[self.leaf_starts]
        return held[1:] > held[:-1]

    def allowed_nodes(self, allowed_leaves: NDArray[np.bool_]) -> Allowed:
        """Lift a leaf mask to all levels: a node is allowed when a leaf under it is.

        Args:
            allowed_leaves: bool ``[n_leaves]``.

        Returns:
            Level l: bool ``[n_nodes_l]``.
        """
        levels = [np.asarray(allowed_leaves, bool)]
        for starts in reversed(self.child_starts[1:]):
            levels.append(np.logical_or.reduceat(levels[-1], starts[:-1]))
        return tuple(reversed(levels))


def build_index(
    ids: SemanticIds, order: NDArray[np.int64] | None = None, reserved: NDArray[np.int32] | None = None
) -> CatalogueIndex:
    """Build the index of a catalogue.

    Args:
        ids: one semantic ID for every item row. Equal IDs share a leaf.
        order: int64 ``[n_items]``, sort key of items within a leaf (for example minus their popularity);
            item row by default.
        reserved: int32 ``[n_reserved, n_levels]``, paths that get a leaf without items; see `reserved_paths`.

    Raises:
        DataError: if the catalogue is empty.
    """
    if ids.n_items == 0:
        raise DataError("the catalogue has no items; an index needs at least one")
    if order is None:
        order = np.arange(ids.n_items)
    paths = ids
    if reserved is not None and len(reserved):
        paths = SemanticIds(np.concatenate([ids.codes, reserved]), ids.codebook_sizes)
        order = np.concatenate([order, np.zeros(len(reserved), np.int64)])
    by_key = np.lexsort((order, *_sort_key(paths)))
    codes = paths.codes[by_key]
    new_node = np.ones(len(codes), bool)
    new_node[1:] = False
    tokens, child_starts = [], []
    for level in range(ids.n_levels):
        parent_first = np.flatnonzero(new_node)
        new_node[1:] |= codes[1:, level] != codes[:-1, level]
        first = np.flatnonzero(new_node)
        tokens.append(codes[first, level].astype(np.int64))
        # Root: one parent, the whole table. Afterwards a parent's children begin where its first row begins.
        starts = np.searchsorted(first, parent_first)
        child_starts.append(np.append(starts, len(first)).astype(np.int64))
    leaf_starts = np.append(np.flatnonzero(new_node), len(codes)).astype(np.int64)
    leaf_items, keyword_leaves = by_key, np.empty(0, np.int64)
    if len(codes) > ids.n_items:
        is_item = by_key < ids.n_items
        keyword_leaves = np.empty(len(codes) - ids.n_items, np.int64)
        keyword_leaves[by_key[~is_item] - ids.n_items] = (np.cumsum(new_node) - 1)[~is_item]
        leaf_starts = np.concatenate([[0], np.cumsum(is_item)])[leaf_starts]
        leaf_items = by_key[is_item]
    return CatalogueIndex(
        codebook_sizes=ids.codebook_sizes,
        tokens=tuple(tokens),
        child_starts=tuple(child_starts),
        leaf_starts=leaf_starts,
        leaf_items=leaf_items.astype(np.int32),
        keyword_leaves=keyword_leaves,
    )


def reserved_paths(codebook_sizes: tuple[int, ...], reserved_slots: tuple[int, ...]) -> NDArray[np.int32]:
    """The paths of all reserved slots, (0, ..., slot, ..., 0): int32 ``[n_reserved, n_levels]``, level after level.

    Args:
        codebook_sizes: codes of each level.
        reserved_slots: reserved slots of each level, its last codes; empty where there are none.
    """
    spans = zip(codebook_sizes, reserved_slots, strict=True) if reserved_slots else ()
    slots = [(level, slot) for level, (size, n) in enumerate(spans) for slot in range(size - n, size)]
    paths = np.zeros((len(slots), len(codebook_sizes)), np.int32)
    for row, (level, slot) in enumerate(slots):
        paths[row, level] = slot
    return paths


def _sort_key(ids: SemanticIds) -> tuple[Nodes, ...]:
    """Keys for `np.lexsort`, least significant first: one packed integer where the codebooks fit 62 bits."""
    bits = [max(1, int(size - 1).bit_length()) for size in ids.codebook_sizes]
    if sum(bits) > 62:
        return tuple(ids.codes[:, level].astype(np.int64) for level in range(ids.n_levels - 1, -1, -1))
    key = np.zeros(ids.n_items, np.int64)
    for level, width in enumerate(bits):
        key = (key << width) | ids.codes[:, level]
    return (key,)


def graph_inputs(index: CatalogueIndex) -> dict[str, NDArray[np.int64]]:
    """The index as named inputs of the retrieval graph: ``token_l``, ``child_start_l`` and ``slot_l`` for every level.

    ``slot_l`` is ``arange(max_children[l])``; its length tells the graph how many children to look at. Arrays are
    padded to two entries, because an exported graph takes a dimension of one for a constant.
    """
    inputs: dict[str, NDArray[np.int64]] = {}
    for level, (token, start) in enumerate(zip(index.tokens, index.child_starts, strict=True)):
        inputs[f"token_{level}"] = np.pad(token, (0, max(0, 2 - len(token))))
        inputs[f"child_start_{level}"] = start
        inputs[f"slot_{level}"] = np.arange(max(2, index.max_children[level]), dtype=np.int64)
    return inputs


def mask_inputs(rows: list[Allowed]) -> dict[str, NDArray[np.bool_]]:
    """Mask rows as inputs of the retrieval graph: ``allowed_l`` is bool ``[n_rows, n_nodes_l]``, padded like tokens."""
    return {
        f"allowed_{level}": np.stack([np.pad(r[level], (0, max(0, 2 - len(r[level])))) for r in rows])
        for level in range(len(rows[0]))
    }
