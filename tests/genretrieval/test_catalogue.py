"""The catalogue index against a dict trie, which is what it means."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.catalogue import CatalogueIndex, _Marks, build_index, graph_inputs, mask_inputs
from genretrieval.errors import DataError
from genretrieval.semantic_ids import SemanticIds

Prefix = tuple[int, ...]


def trie(ids: SemanticIds) -> dict[Prefix, list[int]]:
    """Codes that follow each prefix, sorted."""
    children: dict[Prefix, set[int]] = defaultdict(set)
    for row in ids.codes.tolist():
        for level, code in enumerate(row):
            children[tuple(row[:level])].add(code)
    return {prefix: sorted(codes) for prefix, codes in children.items()}


def prefixes(index: CatalogueIndex) -> list[list[Prefix]]:
    """The prefix of every node of every level, read from the index from the root on."""
    above: list[Prefix] = [()]
    levels = []
    for tokens, starts in zip(index.tokens, index.child_starts, strict=True):
        assert starts[0] == 0
        assert starts[-1] == len(tokens)
        here = [
            (*prefix, int(tokens[node]))
            for parent, prefix in enumerate(above)
            for node in range(starts[parent], starts[parent + 1])
        ]
        levels.append(here)
        above = here
    return levels


@st.composite
def catalogues(draw: st.DrawFn) -> SemanticIds:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = draw(st.lists(row, min_size=1, max_size=30))
    return SemanticIds(np.array(codes, np.int32).reshape(len(codes), len(sizes)), sizes)


@given(catalogues())
def test_children_and_leaves_are_those_of_a_dict_trie(ids: SemanticIds) -> None:
    index, expected = build_index(ids), trie(ids)
    levels = prefixes(index)
    for level, nodes in enumerate(levels):
        assert nodes == sorted({tuple(row[: level + 1]) for row in ids.codes.tolist()})
    for level, parents in enumerate([[()], *levels[:-1]]):
        starts = index.child_starts[level]
        for parent, prefix in enumerate(parents):
            assert index.tokens[level][starts[parent] : starts[parent + 1]].tolist() == expected[prefix]
    assert index.max_children == tuple(
        max(len(codes) for prefix, codes in expected.items() if len(prefix) == level) for level in range(index.n_levels)
    )
    every = np.arange(index.n_leaves)
    assert list(map(tuple, index.leaf_codes(every).tolist())) == levels[-1]
    assert index.leaf_codes(index.item_leaves).tolist() == ids.codes.tolist()
    assert index.leaf_sizes(every).tolist() == [len(index.items_of(leaf)) for leaf in every]
    assert index.leaf_codes(every[::-2]).tolist() == index.leaf_codes(every)[::-2].tolist()


@given(catalogues())
def test_every_item_is_on_its_path_and_in_its_leaf(ids: SemanticIds) -> None:
    index = build_index(ids)
    levels, nodes = prefixes(index), index.item_nodes()
    for row, codes in enumerate(ids.codes.tolist()):
        assert [levels[level][node] for level, node in enumerate(nodes[row])] == [
            tuple(codes[: level + 1]) for level in range(len(codes))
        ]
        assert row in index.items_of(int(nodes[row, -1]))
    assert sorted(index.leaf_items.tolist()) == list(range(ids.n_items))
    assert np.diff(index.leaf_starts()).tolist() == index.leaf_sizes(np.arange(index.n_leaves)).tolist()
    rows, of_leaf = index.items_under(np.arange(index.n_leaves)[::-1])
    assert (nodes[rows, -1] == index.n_leaves - 1 - of_leaf).all()
    assert len(rows) == ids.n_items


@given(catalogues(), st.data())
def test_a_node_closes_with_the_last_allowed_leaf_below_it(ids: SemanticIds, data: st.DataObject) -> None:
    index = build_index(ids)
    before, after = (
        np.array(data.draw(st.lists(st.booleans(), min_size=index.n_leaves, max_size=index.n_leaves))) for _ in range(2)
    )
    allowed, left = index.allowed_nodes(before), index.allowed_nodes(before & after)
    closed = index.closed_with(np.flatnonzero(~after), None if before.all() else allowed)
    for level, (nodes, parents, children) in enumerate(closed):
        assert nodes.tolist() == np.flatnonzero(allowed[level] & ~left[level]).tolist()
        # Of those that a search may reach.
        above = index.parents(level, nodes)
        reached = np.ones(len(nodes), bool) if not level else ~np.isin(above, closed[level - 1].nodes)
        assert parents.tolist() == above[reached].tolist()
        assert (index.child_starts[level][parents] + children).tolist() == nodes[reached].tolist()


@pytest.mark.parametrize(("size", "expected"), [(1, "uint8"), (256, "uint8"), (257, "int16"), (2**15, "int16"),
                                                (2**15 + 1, "int32")])  # fmt: skip
def test_a_code_takes_as_few_bytes_as_its_codebook_needs(size: int, expected: str) -> None:
    index = build_index(SemanticIds(np.array([[0], [size - 1]], np.int32), (size,)))
    assert index.tokens[0].dtype == expected
    assert index.tokens[0][-1] == size - 1


@given(catalogues())
def test_parents_and_sizes_are_those_of_a_search_of_the_starts(ids: SemanticIds) -> None:
    index = build_index(ids)
    for level, starts in enumerate(index.child_starts):
        nodes = np.arange(len(index.tokens[level]))
        expected = np.searchsorted(starts, nodes, side="right") - 1
        assert index.parents(level, nodes).tolist() == expected.tolist()
        assert index.parents(level, nodes[::-1].astype(np.int32)).tolist() == expected[::-1].tolist()
    assert index.leaf_sizes(np.arange(index.n_leaves)).tolist() == np.diff(index.leaf_starts()).tolist()


def test_marks_are_counted_across_words() -> None:
    rng = np.random.default_rng(0)
    marked = rng.random(1000) < 0.3
    marks = _Marks.at(np.flatnonzero(marked), 1000)
    places = np.arange(1000)
    assert marks.up_to(places).tolist() == marked.cumsum().tolist()
    assert marks.on(places).tolist() == marked.tolist()


def test_bytes_of_an_index_by_hand() -> None:
    """A level: a byte a code, four a start; twelve for 64 nodes, or leaves; four an item, eight a shared leaf."""
    alone = build_index(SemanticIds(np.array([[0, 0], [0, 1], [1, 0]], np.int32), (3, 3)))
    assert alone.nbytes == (2 + 3) * 1 + (2 + 3) * 4 + 3 * 12 + 3 * 4 + 4
    shared = build_index(SemanticIds(np.array([[0, 0], [0, 0], [1, 0]], np.int32), (3, 3)))
    assert shared.nbytes == (2 + 2) * 1 + (2 + 3) * 4 + 3 * 12 + 3 * 4 + (4 + 4) + 4


@given(catalogues())
def test_items_of_a_leaf_are_listed_by_order_then_row(ids: SemanticIds) -> None:
    order = np.random.default_rng(ids.n_items).integers(-3, 3, ids.n_items)
    index = build_index(ids, order)
    for leaf, codes in enumerate(prefixes(index)[-1]):
        rows = [row for row, own in enumerate(ids.codes.tolist()) if tuple(own) == codes]
        assert index.items_of(leaf).tolist() == sorted(rows, key=lambda row: (order[row], row))


@given(catalogues(), st.data())
def test_a_node_is_allowed_when_a_leaf_below_is(ids: SemanticIds, data: st.DataObject) -> None:
    index = build_index(ids)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=ids.n_items, max_size=ids.n_items)))
    leaves = index.allowed_leaves(allowed)
    levels = prefixes(index)
    assert leaves.tolist() == [bool(allowed[index.items_of(leaf)].any()) for leaf in range(index.n_leaves)]
    open_ids = {tuple(row) for row, ok in zip(ids.codes.tolist(), allowed, strict=True) if ok}
    for level, nodes in enumerate(index.allowed_nodes(leaves)):
        assert nodes.tolist() == [any(i[: level + 1] == prefix for i in open_ids) for prefix in levels[level]]


@given(catalogues(), st.booleans())
def test_packed_keys_and_plain_sorting_build_the_same(ids: SemanticIds, ordered: bool) -> None:
    # Of more than two levels, codebooks of 2**31 entries do not fit one key: the second index is sorted by columns.
    wide = SemanticIds(ids.codes, tuple(2**31 - 1 for _ in ids.codebook_sizes))
    order = None if not ordered else np.random.default_rng(ids.n_items).integers(-2, 2, ids.n_items)
    packed, plain = build_index(ids, order), build_index(wide, order)
    for one, other in zip(packed.tokens + packed.child_starts, plain.tokens + plain.child_starts, strict=True):
        assert one.tolist() == other.tolist()
    for name in ("leaf_items", "uneven_leaves", "uneven_shifts"):
        assert getattr(packed, name).tolist() == getattr(plain, name).tolist()


def test_one_item_by_hand() -> None:
    index = build_index(SemanticIds(np.array([[2, 0, 1]], np.int32), (3, 3, 3)))
    assert [tokens.tolist() for tokens in index.tokens] == [[2], [0], [1]]
    assert [starts.tolist() for starts in index.child_starts] == [[0, 1]] * 3
    assert index.items_of(0).tolist() == [0]


def test_all_items_in_one_leaf() -> None:
    index = build_index(SemanticIds(np.ones((5, 2), np.int32), (3, 3)), np.array([4, 3, 2, 1, 0]))
    assert (index.n_leaves, index.n_items) == (1, 5)
    assert index.items_of(0).tolist() == [4, 3, 2, 1, 0]


def test_an_empty_catalogue_is_refused() -> None:
    with pytest.raises(DataError, match="no items"):
        build_index(SemanticIds(np.empty((0, 2), np.int32), (3, 3)))


def test_graph_inputs_never_have_a_dimension_of_one() -> None:
    index = build_index(SemanticIds(np.array([[2, 0]], np.int32), (3, 3)))
    inputs = graph_inputs(index) | mask_inputs([index.allowed_nodes(np.ones(1, bool))] * 2)
    assert inputs["token_0"].tolist() == [2, 0]
    assert inputs["child_start_0"].tolist() == [0, 1]
    assert inputs["slot_1"].tolist() == [0, 1]
    assert inputs["allowed_1"].tolist() == [[True, False]] * 2
