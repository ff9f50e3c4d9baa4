"""The catalogue index: which codes may follow which, for every item that exists, as flat arrays.

Level-wise CSR over the sorted code table. Level l has one node for every distinct prefix of l + 1 codes; nodes of a
level are numbered in sorted order, so the children of a node are a contiguous range of the next level and a child's
node id is simply its position there: no next-state column. Nodes of the last level are leaves; a leaf holds one item
or, where semantic IDs collide, several. A keyword leaf, the path of a reserved slot alone, holds none: what it stands
for is bound while the catalogue is served, and differs from request to request.

What a request may see (stock, filters, deletions, closed keyword leaves) is one mechanism, a mask over leaves, which
`allowed_nodes` lifts to every level so that a beam never enters a subtree in which nothing is allowed. The few items
that one request alone excludes get no mask: `closed_with` finds the nodes that close with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import SemanticIds

Nodes = NDArray[np.int64]
AnyNodes = NDArray[np.integer[Any]]
Allowed = tuple[NDArray[np.bool_], ...]


class Closed(NamedTuple):
    """Nodes of one level that nothing is left under.

    Attributes:
        nodes: int64, sorted.
        parents: int64 ``[n]``, the node above each of those whose parent stays open; a search reaches no others.
        children: int64 ``[n]``, which child of its parent each of these is, counted from 0.
    """

    nodes: Nodes
    parents: Nodes
    children: Nodes


# Bits of a word by their place: itself, and all up to it.
_ONE = np.uint64(1) << np.arange(64, dtype=np.uint64)
_UP_TO = _ONE + (_ONE - np.uint64(1))


class _Marks(NamedTuple):
    """Which of many places are marked, so that marks up to a place are counted by two reads.

    To search for a place among the marked ones would read memory that no cache holds again and again.

    Attributes:
        bits: uint64, the marks of 64 places each.
        before: int32, marks before those.
    """

    bits: NDArray[np.uint64]
    before: NDArray[np.int32]

    @classmethod
    def at(cls, places: AnyNodes, n: int) -> _Marks:
        """Marks at `places` of n."""
        bits = np.packbits(_marked(-(-n // 64) * 64, places), bitorder="little").view("<u8")
        counts = np.bitwise_count(bits)
        return cls(bits, counts.cumsum(dtype=np.int32) - counts)

    def up_to(self, places: AnyNodes) -> Nodes:
        """Marks up to each of `places`, with its own: int64 ``[len(places)]``."""
        block = places >> 6
        counts: Nodes = self.before[block] + np.bitwise_count(self.bits[block] & _UP_TO[places & 63]).astype(np.int64)
        return counts

    def on(self, places: AnyNodes) -> NDArray[np.bool_]:
        """Whether each of `places` is marked, bool ``[len(places)]``."""
        marked: NDArray[np.bool_] = self.bits[places >> 6] & _ONE[places & 63] != 0
        return marked


@dataclass(frozen=True)
class CatalogueIndex:
    """An immutable snapshot of the trie over semantic IDs, in as few bytes an item as its numbers need.

    Attributes:
        codebook_sizes: codes of each level.
        tokens: level l: `token_type` ``[n_nodes_l]``, the code that each node adds to its parent's prefix.
        child_starts: level l: int32 ``[n_nodes_(l-1) + 1]``; node p of the level above has the children
            ``[child_starts[l][p], child_starts[l][p + 1])``. Level 0 hangs under one root.
        max_children: largest number of children of any node above each level; what a search step has to look at.
        leaf_items: int32 ``[n_items]``, item rows, leaf after leaf, in the order they are to be listed.
        uneven_leaves: int32, sorted, leaves that hold more items than one, or none. The others need no word.
        uneven_shifts: int32 ``[len(uneven_leaves) + 1]``: behind the first n uneven leaves, the items of leaf k begin
            at ``k + uneven_shifts[n]`` of `leaf_items`.
        keyword_leaves: int64 ``[n_reserved]``, the leaf of each reserved slot, in the order of `reserved_paths`.
    """

    codebook_sizes: tuple[int, ...]
    tokens: tuple[NDArray[np.integer[Any]], ...]
    child_starts: tuple[NDArray[np.int32], ...]
    max_children: tuple[int, ...]
    leaf_items: NDArray[np.int32]
    uneven_leaves: NDArray[np.int32]
    uneven_shifts: NDArray[np.int32]
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
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        alone = (self.leaf_items, self.uneven_leaves, self.uneven_shifts, self.keyword_leaves)
        marks = [array for marked in (*self._first_children, self._uneven) for array in marked]
        return sum(array.nbytes for array in (*self.tokens, *self.child_starts, *marks, *alone))

    def item_nodes(self) -> Nodes:
        """int64 ``[n_items, n_levels]``: the path of every item row, as node ids."""
        return self.paths(self.item_leaves)

    def paths(self, leaves: AnyNodes) -> Nodes:
        """int64 ``[len(leaves), n_levels]``: the path to each leaf, as node ids."""
        parents = [np.repeat(np.arange(len(s) - 1), np.diff(s)) for s in self.child_starts]
        path = np.empty((len(leaves), self.n_levels), np.int64)
        path[:, -1] = leaves
        for level in range(self.n_levels - 1, 0, -1):
            path[:, level - 1] = parents[level][path[:, level]]
        return path

    def parents(self, level: int, nodes: AnyNodes) -> Nodes:
        """int64: the node above each of `nodes`, quick for few of them; all of level 0 hang under root 0."""
        return self._first_children[level].up_to(nodes) - 1

    @cached_property
    def _first_children(self) -> tuple[_Marks, ...]:
        """Level l: the nodes that are a parent's first child; there are as many up to a node as parents."""
        return tuple(_Marks.at(starts[:-1], int(starts[-1])) for starts in self.child_starts)

    @cached_property
    def _uneven(self) -> _Marks:
        """`uneven_leaves`."""
        return _Marks.at(self.uneven_leaves, self.n_leaves)

    def ancestors(self, leaves: AnyNodes) -> tuple[Nodes, ...]:
        """Level l: int64, node ids on the way to each of `leaves`; quick for few of them, as `paths` is for all."""
        levels = [np.asarray(leaves, np.int64)]
        for level in range(self.n_levels - 1, 0, -1):
            levels.append(self.parents(level, levels[-1]))
        return tuple(reversed(levels))

    @cached_property
    def item_leaves(self) -> NDArray[np.int32]:
        """int32 ``[n_items]``: the leaf of every item row, made when it is first asked for; `nbytes` leaves it out."""
        leaves = np.empty(self.n_items, np.int32)
        leaves[self.leaf_items] = np.repeat(np.arange(self.n_leaves, dtype=np.int32), np.diff(self.leaf_starts()))
        return leaves

    def leaf_codes(self, leaves: AnyNodes) -> NDArray[np.int32]:
        """int32 ``[len(leaves), n_levels]``: the semantic IDs of `leaves`."""
        codes = np.empty((len(leaves), self.n_levels), np.int32)
        for level, nodes in enumerate(self.ancestors(leaves)):
            codes[:, level] = self.tokens[level][nodes]
        return codes

    def leaf_starts(self) -> Nodes:
        """int64 ``[n_leaves + 1]``: where in `leaf_items` those of every leaf begin, and where the last one's end."""
        behind = np.diff(self.uneven_leaves, prepend=-1, append=self.n_leaves)
        return np.arange(self.n_leaves + 1) + np.repeat(self.uneven_shifts, behind)

    def leaf_sizes(self, leaves: AnyNodes) -> NDArray[np.int32]:
        """int32 ``[len(leaves)]``: how many items each of `leaves` holds."""
        return self._spans(leaves)[1]

    def _spans(self, leaves: AnyNodes) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Where the items of each of `leaves` begin in `leaf_items`, and how many there are: int32."""
        up_to = self._uneven.up_to(leaves)
        shifts = self.uneven_shifts[up_to - self._uneven.on(leaves)]
        return leaves.astype(np.int32) + shifts, self.uneven_shifts[up_to] - shifts + np.int32(1)

    def items_of(self, leaf: int) -> NDArray[np.int32]:
        """Item rows under `leaf`, in listing order."""
        return self.items_under(np.asarray([leaf]))[0]

    def items_under(self, leaves: AnyNodes) -> tuple[NDArray[np.int32], Nodes]:
        """Item rows under each of `leaves` in turn, in listing order, and the position in `leaves` of each row's."""
        starts, sizes = self._spans(leaves)
        places, of_leaf = ranges(starts, sizes)
        return self.leaf_items[places], of_leaf

    def allowed_leaves(self, allowed_items: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Bool ``[n_leaves]``: leaves that hold at least one allowed item (``allowed_items`` is ``[n_items]``)."""
        listed = allowed_items[self.leaf_items]
        if not len(self.uneven_leaves):
            return listed
        held = np.zeros(self.n_items + 1, np.int32)
        np.cumsum(listed, out=held[1:])
        held = held[self.leaf_starts()]
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

    def closed_with(self, leaves: Nodes, allowed: Sequence[NDArray[np.bool_]] | None) -> tuple[Closed, ...]:
        """What closes when a few leaves do: on each level the nodes under which nothing allowed is left.

        Only the children of nodes above a closed one are looked at, so it costs what the leaves are, not the catalogue.

        Args:
            leaves: int64, sorted, each once.
            allowed: level l: bool, at least ``[n_nodes_l]``, what is allowed before; None for every node.

        Returns:
            Level l: nodes that were allowed and are not any more.
        """
        levels = [NOTHING_CLOSED] * self.n_levels
        nodes = leaves if allowed is None else leaves[allowed[-1].take(leaves)]
        for level in range(self.n_levels - 1, -1, -1):
            if not len(nodes):
                break
            parents = self.parents(level, nodes)
            # Closed children of one parent stand side by side.
            first, gone = runs(parents)
            above = parents.take(first)
            begin, end = self.child_starts[level].take(above), self.child_starts[level].take(above + 1)
            closes = gone == end - begin
            if allowed is not None:
                doubt = np.flatnonzero(~closes)
                children, of_parent = ranges(begin[doubt], (end - begin)[doubt])
                left = np.bincount(of_parent[allowed[level].take(children)], minlength=len(doubt))
                closes[doubt] = left == gone[doubt]
            levels[level] = Closed(nodes, parents, nodes - begin.repeat(gone))
            if level and closes.any():
                reached = ~closes.repeat(gone)
                levels[level] = Closed(nodes, parents[reached], levels[level].children[reached])
            nodes = above[closes]
        return tuple(levels)


_NONE = np.empty(0, np.int64)
NOTHING_CLOSED = Closed(_NONE, _NONE, _NONE)


def runs(values: AnyNodes) -> tuple[Nodes, Nodes]:
    """Where runs of equal values begin in a vector of one value or more, and how long they are: int64."""
    edges = np.ones(len(values) + 1, bool)
    np.not_equal(values[1:], values[:-1], out=edges[1:-1])
    bounds = edges.nonzero()[0]
    return bounds[:-1], bounds[1:] - bounds[:-1]


def ranges(starts: AnyNodes, sizes: AnyNodes) -> tuple[Nodes, Nodes]:
    """The numbers of each range ``[starts[i], starts[i] + sizes[i])`` in turn, and the i of each: int64."""
    behind = sizes.cumsum(dtype=np.int64)
    of_range = np.arange(len(sizes)).repeat(sizes)
    return np.arange(len(of_range)) + (starts + sizes - behind)[of_range], of_range


def token_type(codebook_size: int) -> type[np.integer[Any]]:
    """The smallest integer that holds every code of a level and that both torch and ONNX Runtime gather."""
    for kind in (np.uint8, np.int16):
        if codebook_size - 1 <= np.iinfo(kind).max:
            return kind
    return np.int32


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
    paths = ids
    if reserved is not None and len(reserved):
        paths = SemanticIds(np.concatenate([ids.codes, reserved]), ids.codebook_sizes)
        order = None if order is None else np.concatenate([order, np.zeros(len(reserved), np.int64)])
    by_key = sorted_rows(paths.codes, ids.codebook_sizes, order)
    codes = paths.codes[by_key]
    new_node = np.zeros(len(codes), bool)
    new_node[0] = True
    tokens, child_starts, first = [], [], np.zeros(1, np.int64)
    for level, size in enumerate(ids.codebook_sizes):
        column = np.ascontiguousarray(codes[:, level], token_type(size))
        parent_first = first
        new_node[1:] |= column[1:] != column[:-1]
        first = np.flatnonzero(new_node)
        tokens.append(column[first])
        # Root: one parent, the whole table. Afterwards a parent's children begin where its first row begins.
        starts = np.flatnonzero(_marked(len(codes), parent_first)[first])
        child_starts.append(np.append(starts, len(first)).astype(np.int32))
    is_item = by_key < ids.n_items
    rows = np.diff(first, append=len(codes))
    keyword_leaves = np.empty(len(codes) - ids.n_items, np.int64)
    if len(keyword_leaves):
        at = np.flatnonzero(~is_item)
        keyword_leaves[by_key[at] - ids.n_items] = np.searchsorted(first, at, side="right") - 1
        rows[keyword_leaves] -= 1
    uneven = np.flatnonzero(rows != 1)
    return CatalogueIndex(
        codebook_sizes=ids.codebook_sizes,
        tokens=tuple(tokens),
        child_starts=tuple(child_starts),
        max_children=tuple(int(np.diff(starts).max()) for starts in child_starts),
        leaf_items=by_key[is_item].astype(np.int32),
        uneven_leaves=uneven.astype(np.int32),
        uneven_shifts=np.append(0, np.cumsum(rows[uneven] - 1)).astype(np.int32),
        keyword_leaves=keyword_leaves,
    )


def _marked(n: int, places: AnyNodes) -> NDArray[np.bool_]:
    marks = np.zeros(n, bool)
    marks[places] = True
    return marks


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


def sorted_rows(codes: NDArray[np.int32], codebook_sizes: tuple[int, ...], order: Nodes | None = None) -> Nodes:
    """Rows of ``[n, n_levels]`` by semantic ID, then `order`, then row: int64 ``[n]``."""
    widths = [max(1, int(size - 1).bit_length()) for size in codebook_sizes]
    columns = list(codes.T)
    if order is not None:
        low, high = int(order.min()), int(order.max())
        widths.append((high - low).bit_length())
        columns.append(order - low)
    if sum(widths) > 63:
        return np.lexsort(columns[::-1])
    key = np.zeros(len(codes), np.int64)
    for column, width in zip(columns, widths, strict=True):
        key <<= width
        key |= column
    return np.argsort(key, kind="stable")


def graph_inputs(index: CatalogueIndex) -> dict[str, NDArray[np.integer[Any]]]:
    """The index as named inputs of the retrieval graph: ``token_l``, ``child_start_l`` and ``slot_l`` for every level.

    ``slot_l`` is int64 ``arange(max_children[l])``; its length tells the graph how many children to look at. Arrays are
    padded to two entries, because an exported graph takes a dimension of one for a constant.
    """
    inputs: dict[str, NDArray[np.integer[Any]]] = {}
    for level, (token, start) in enumerate(zip(index.tokens, index.child_starts, strict=True)):
        inputs[f"token_{level}"] = token if len(token) > 1 else np.pad(token, (0, 1))
        inputs[f"child_start_{level}"] = start
        inputs[f"slot_{level}"] = np.arange(max(2, index.max_children[level]), dtype=np.int64)
    return inputs


def mask_inputs(rows: list[Allowed]) -> dict[str, NDArray[np.bool_]]:
    """Mask rows as inputs of the retrieval graph: ``allowed_l`` is bool ``[n_rows, n_nodes_l]``, padded like tokens."""
    return {
        f"allowed_{level}": np.stack([np.pad(r[level], (0, max(0, 2 - len(r[level])))) for r in rows])
        for level in range(len(rows[0]))
    }


def closed_inputs(searches: Sequence[tuple[Closed, ...]]) -> dict[str, Nodes]:
    """What each search of a batch must not enter, as inputs of the retrieval graph.

    ``closed_parent_l`` is int64 ``[n_searches, n]``, nodes of the level above (0, the root, above level 0);
    ``closed_child_l`` of the same shape says which of its children is closed, counted from its first. The longest list
    of the batch makes n, and at least two; -1 stands for none.
    """
    inputs: dict[str, Nodes] = {}
    for level, closed in enumerate(zip(*searches, strict=True)):
        longest = max(2, *(len(one.parents) for one in closed))
        both = np.full((2, len(searches), longest), -1, np.int64)
        for row, one in enumerate(closed):
            if n := len(one.parents):
                both[0, row, :n], both[1, row, :n] = one.parents, one.children
        inputs[f"closed_parent_{level}"], inputs[f"closed_child_{level}"] = both
    return inputs
