from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genretrieval import item_ids as module
from genretrieval.item_ids import ItemIds

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
# Of few letters, so that one is another's beginning, or differs from it in its last byte alone.
ALIKE = st.tuples(st.sampled_from(["", "a", "a\0", "p" * 7, "p" * 8, "é" * 255]), st.text("ab\0é", max_size=2))
IDS = st.one_of(ANY, ALIKE.map("".join), st.integers(0, 40).map("item-{}".format), st.just("\ud800"))
KNOWN = IDS.filter(lambda text: "\ud800" not in text)


@settings(deadline=None)
@given(st.lists(KNOWN, unique=True), st.lists(KNOWN, unique=True), st.lists(IDS), st.booleans())
def test_ids_are_found_as_in_a_dictionary(
    of_bundle: list[str], more: list[str], asked: list[str], at_once: bool
) -> None:
    item_ids = ItemIds(pl.Series(of_bundle, dtype=pl.String))
    before, later = list(of_bundle), [item for item in more if item not in of_bundle]
    for grown, ids in ((item_ids, before), (item_ids.with_more(later), before + later)):
        rows = {item: row for row, item in enumerate(ids)}
        asked_too = asked + ids[::-1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_FEW", 0 if at_once else 1000)
            assert grown.rows_of(asked_too).tolist() == [rows.get(item, -1) for item in asked_too]
        assert [grown.row_of(item) for item in asked_too] == [rows.get(item) for item in asked_too]
        assert [item in grown for item in asked] == [item in rows for item in asked]
        assert (list(grown), [grown[row] for row in range(len(ids))], len(grown)) == (ids, ids, len(ids))
        assert grown.continues(item_ids)
        assert item_ids.continues(grown) == (len(grown) == len(of_bundle))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 511, 512])
def test_ids_of_every_length_that_differ_in_the_last_byte(length: int) -> None:
    """One of thirty is not in the catalogue."""
    letters = "abcdefghijklmnopqrstuvwxyzéöü外"
    ids = ["x" * (length - 1) + letter for letter in letters]
    item_ids = ItemIds(ids[:-1])
    assert item_ids.rows_of(ids).tolist() == [*range(len(ids) - 1), -1]
    assert item_ids.rows_of([f"{item}x" for item in ids] + [item[:-1] for item in ids]).max() == -1


def test_a_large_catalogue_is_built_in_parts_and_every_id_has_a_place() -> None:
    n = 3 * module._AT_ONCE + 1
    ids = pl.Series([f"item-{row}" for row in range(n)])
    item_ids = ItemIds(ids)
    assert (item_ids.rows_of(ids) == np.arange(n)).all()
    assert item_ids.rows_of(pl.Series([f"item-{row}" for row in range(n, 2 * n)])).max() == -1
    assert not item_ids._of_bundle.apart
    table = item_ids._of_bundle
    assert table._rows.nbytes + table._factors.nbytes + table._starts.nbytes < 12 * n


def test_an_id_without_a_place_of_its_own_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hashes are the same, so one id has the place and the others are kept apart."""
    monkeypatch.setattr(module, "_hashes", lambda texts: np.zeros(len(texts), np.uint64))
    monkeypatch.setattr(module, "hash", lambda text: 0, raising=False)
    ids = [f"item-{row}" for row in range(20)]
    item_ids = ItemIds(ids)
    assert len(item_ids._of_bundle.apart) == 20
    assert item_ids.rows_of([*ids, "item-20"]).tolist() == [*range(20), -1]
    assert item_ids.row_of("item-7") == 7


def test_rows_count_from_the_end_and_there_are_no_others() -> None:
    item_ids = ItemIds(["a", "b"]).with_more(["c"])
    assert [item_ids[row] for row in (-1, -2, -3)] == ["c", "b", "a"]
    for row in (3, -4):
        with pytest.raises(IndexError, match=f"no item has row {row}; there are 3"):
            item_ids[row]


def test_what_grew_from_another_bundle_continues_nothing() -> None:
    one = ItemIds(["a", "b"])
    assert not ItemIds(["a", "b"]).continues(one)
    assert one.with_more(["c", "d"]).continues(one.with_more(["c"]))
    assert not one.with_more(["d", "c"]).continues(one.with_more(["c"]))


@pytest.mark.parametrize("at_once", [True, False])
def test_an_id_with_a_nul_is_not_the_id_that_it_begins_with(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """All that has no place of its own in the table is looked for at row 0."""
    monkeypatch.setattr(module, "_FEW", 0 if at_once else 1000)
    asked = ["a", "a\0", "a\0b", "b"]
    assert ItemIds(["a\0b", "c"]).rows_of(asked).tolist() == [-1, -1, 0, -1]
    assert ItemIds(["a\0b"]).with_more(["a"]).rows_of(asked).tolist() == [1, -1, 0, -1]
