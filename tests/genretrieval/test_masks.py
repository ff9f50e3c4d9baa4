"""Rows of masks against the plain way: mark the leaves, lift them to every level."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genretrieval.catalogue import build_index, reserved_paths
from genretrieval.item_ids import ItemIds
from genretrieval.masks import Mask, MaskRows
from genretrieval.request import Filters
from genretrieval.semantic_ids import SemanticIds
from genretrieval.servable import Catalogue

NOBODY = np.empty(0, np.int64)
SIZES, RESERVED = (4, 4, 3), (1, 1, 0)


def catalogue(codes: list[tuple[int, int, int]]) -> Catalogue:
    ids = SemanticIds(np.asarray(codes, np.int32), SIZES)
    names = [f"item-{row}" for row in range(len(codes))]
    table = pl.DataFrame({"item_id": names, "price": [float(row) for row in range(len(codes))]})
    index = build_index(ids, reserved=reserved_paths(SIZES, RESERVED))
    return Catalogue(table, ids, index, ItemIds(names))


items = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12)


@given(items, st.data())
@settings(max_examples=200, deadline=None)
def test_a_row_holds_what_its_mask_lets_through(codes, data) -> None:
    gone = data.draw(st.sets(st.integers(0, len(codes) - 1)))
    made = replace(catalogue(codes), gone=np.asarray(sorted(gone), np.int64))
    few = data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    with pytest.MonkeyPatch.context() as patched:
        # Whatever is followed one by one.
        patched.setattr("genretrieval.masks._FEW", few)
        hold_and_compare(made, data)


def hold_and_compare(made: Catalogue, data: st.DataObject) -> None:
    masks, n, gone = MaskRows(made, n_rows=3), len(made.item_ids), made.gone.tolist()
    assert masks.lets(0, np.arange(n), NOBODY).tolist() == (~np.isin(np.arange(n), gone)).tolist()
    for _ in range(3):
        low = data.draw(st.none() | st.integers(0, n))
        within = data.draw(st.none() | st.lists(st.lists(st.integers(0, n - 1), unique=True, max_size=n), max_size=2))
        opened = tuple(data.draw(st.lists(st.integers(0, 1), unique=True)))
        sets = None if within is None else tuple(np.asarray(sorted(rows), np.int64) for rows in within)
        without = data.draw(st.none() | st.lists(st.integers(0, n - 1), unique=True, min_size=1))
        blocked = None if without is None else np.asarray(sorted(without), np.int64)
        mask = Mask(None if low is None else Filters(min_price=low), opened, sets, blocked)
        matching = np.arange(n) >= (low or 0)
        matching &= ~np.isin(np.arange(n), [*(without or []), *gone])
        if within is not None:
            matching &= np.isin(np.arange(n), [row for rows in within for row in rows])
        leaves = np.zeros(made.index.n_leaves, bool)
        for leaf in range(made.index.n_leaves):
            leaves[leaf] = bool(matching[made.index.items_of(leaf)].any())
        leaves[made.index.keyword_leaves[list(opened)]] = True
        with masks.hold([mask]) as (row,):
            assert masks.lets(row, np.arange(n), NOBODY).tolist() == matching.tolist()
            for level, allowed in enumerate(made.index.allowed_nodes(leaves)):
                assert masks.arrays[f"allowed_{level}"][row, : len(allowed)].tolist() == allowed.tolist()


@given(items)
def test_ancestors_are_the_way_to_a_leaf(codes) -> None:
    index = catalogue(codes).index
    leaves = np.arange(index.n_leaves)
    assert np.stack(index.ancestors(leaves), axis=1).tolist() == index.paths(leaves).tolist()
    assert index.item_leaves.tolist() == index.item_nodes()[:, -1].tolist()


@given(items, st.data())
@settings(max_examples=100, deadline=None)
def test_what_a_request_excludes_closes_what_a_mask_without_it_would(codes, data) -> None:
    """Also where a leaf has other items that the mask lets through, or that it does not."""
    made, n = catalogue(codes), len(codes)
    excluded, low = data.draw(st.sets(st.integers(0, n - 1))), data.draw(st.none() | st.integers(0, n))
    rows = np.asarray(sorted(excluded), np.int64)
    filters = None if low is None else Filters(min_price=low)
    masks = MaskRows(made, n_rows=4)
    with masks.hold([Mask(filters), Mask(filters, without=rows)]) as (row, expected):
        closed = masks.closed(row, rows)
        for level, array in enumerate(masks.arrays.values()):
            n_nodes = len(made.index.tokens[level])
            left = array[row].copy()
            left[closed[level].nodes] = False
            assert left[:n_nodes].tolist() == array[expected, :n_nodes].tolist()
        for share in (0.0, 1.0):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("genretrieval.masks._SINGLE", share)
                found = masks.lets(row, np.arange(n), rows)
            assert found.tolist() == masks.lets(expected, np.arange(n), NOBODY).tolist()


def test_a_mask_is_found_again_by_its_array_and_not_by_an_equal_one() -> None:
    masks = MaskRows(catalogue([(0, 0, 0), (1, 1, 0)]), n_rows=4)
    rows = np.asarray([1])
    with masks.hold([Mask(within=(rows,)), Mask(within=(rows,)), Mask(within=(rows.copy(),))]) as (one, same, other):
        assert one == same != other


def test_what_was_written_goes_on_as_another_array() -> None:
    """Whoever keeps a copy on a device sends it again by that; what is found again is the same."""
    masks = MaskRows(catalogue([(0, 0, 0), (1, 1, 0)]), n_rows=4)
    before = masks.arrays
    with masks.hold([Mask(Filters(min_price=1))]):
        written = masks.arrays
        assert all(written[name] is not array for name, array in before.items())
        assert all(written[name].base is not None for name in before)
        with masks.hold([Mask(Filters(min_price=1)), Mask()]):
            assert all(masks.arrays[name] is array for name, array in written.items())


@pytest.mark.parametrize("opened", [(), (0,), (1,), (0, 1)])
def test_row_zero_keeps_keyword_leaves_closed(opened: tuple[int, ...]) -> None:
    made = catalogue([(0, 0, 0), (1, 1, 0)])
    masks = MaskRows(made, n_rows=3)
    with masks.hold([Mask(open=opened)]) as (row,):
        last = masks.arrays["allowed_2"]
        assert last[row][made.index.keyword_leaves].tolist() == [place in opened for place in (0, 1)]
        assert not last[0][made.index.keyword_leaves].any()
        assert (row == 0) == (not opened)
