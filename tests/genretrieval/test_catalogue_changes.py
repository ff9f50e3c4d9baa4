"""Changes of a catalogue: what is refused, and that any sequence of them comes to what was built at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from genretrieval.bundle import CODEBOOKS, Manifest
from genretrieval.catalogue_changes import (
    AHEAD,
    CatalogueChanges,
    ChangeChecker,
    ChangesFile,
    early,
    file_name,
    time_after,
)
from genretrieval.errors import DataError
from genretrieval.features import RequestFeatures
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.request import Filters, RetrieveRequest
from genretrieval.retrieval import Leaves, Retriever
from genretrieval.servable import Catalogue

SIZES = (3, 4)
CODES = pl.List(pl.Int32())
TABLE = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "semantic_id": pl.Series([[0, 0], [0, 0], [0, 3], [2, 1]], dtype=CODES),
        "popularity": [1, 9, 5, 5],
        "title": ["red shoe", "blue shoe", "hat", None],
        "brand": ["acme", "umbra", "acme", None],
        "categories": [["shoes", "red"], ["shoes"], [], None],
        "price": [10.0, 20.0, 30.0, None],
        "in_stock": [True, True, False, True],
    }
)
INPUTS = ("beams", "mask_row", *(f"{name}_{level}" for name in ("token", "child_start", "allowed") for level in (0, 1)))


@dataclass(frozen=True)
class InMemory:
    """A bundle that is on no disk."""

    table: pl.DataFrame
    manifest: Manifest
    keywords: KeywordCodebook | None = None
    vectors: NDArray[np.float32] | None = None

    def features(self) -> RequestFeatures:
        return RequestFeatures((), (), 0, "", 4, keywords=self.keywords)

    def catalogue(self) -> pl.DataFrame:
        return self.table

    def item_vectors(self) -> NDArray[np.float32] | None:
        return self.vectors


def bundle(table: pl.DataFrame = TABLE, **manifest: Any) -> InMemory:
    given = {"codebook_sizes": SIZES, "graph_inputs": INPUTS, "n_items": len(table)} | manifest
    made = Manifest(
        created=datetime(2026, 1, 2, tzinfo=UTC), genretrieval_version="0.1.0", opset=18, minimum_onnxruntime="1.20",
        max_history=3, max_query_tokens=4, reads_queries=False, beam_width=4, exclude_seen=False, **given,
    )  # fmt: skip
    return InMemory(table, made)


def checker(shop: InMemory, **changes: Any) -> ChangeChecker:
    return replace(ChangeChecker(Catalogue.open(shop), shop.manifest, shop.keywords), **changes)


def changes(*rows: dict[str, Any], **schema: Any) -> ChangesFile:
    """A table of some rows; what a row does not name, another one may."""
    types = {"semantic_id": CODES, "fields": pl.List(pl.String()), **dict(TABLE.schema), **schema}
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [pl.Series(name, [row.get(name) for row in rows], types.get(name)) for name in names]
    return ChangesFile(pl.DataFrame(columns))


@pytest.fixture(scope="module")
def shop() -> InMemory:
    return bundle()


@pytest.fixture(scope="module")
def base(shop: InMemory) -> ChangeChecker:
    return checker(shop)


def test_what_is_there_changes_and_nothing_else(base) -> None:
    catalogue = base.catalogue.updated(
        base.check(changes({"item_id": "b", "price": None}, {"item_id": "c", "price": 7.0}), "1")
    )
    assert catalogue.table["price"].to_list() == [10.0, None, 7.0, None]
    assert catalogue.table.drop("price").equals(TABLE.drop("price"))
    assert base.catalogue.table.equals(TABLE)
    assert catalogue.index is base.catalogue.index
    assert (catalogue.revision, base.catalogue.revision) == (1, 0)


def test_lists_and_fields_of_single_rows(base) -> None:
    rows = (
        {"item_id": "a", "categories": ["boots"], "price": 1.0, "fields": ["categories"]},
        {"item_id": "b", "categories": None, "price": 2.0, "fields": None},
        {"item_id": "c", "categories": ["x"], "price": 3.0, "fields": []},
    )
    table = base.catalogue.updated(base.check(changes(*rows), "1")).table
    assert table["categories"].to_list() == [["boots"], None, [], None]
    assert table["price"].to_list() == [10.0, 2.0, 30.0, None]


def test_items_come_go_and_come_back(base) -> None:
    came = base.catalogue.updated(
        base.check(changes({"item_id": "e", "semantic_id": [1, 2], "title": "cap", "op": "upsert"}), "1")
    )
    assert list(came.item_ids) == ["a", "b", "c", "d", "e"]
    assert came.item_ids.row_of("e") == 4
    assert came.ids.codes[4].tolist() == [1, 2]
    assert came.table.row(4, named=True) == {
        **dict.fromkeys(TABLE.columns), "item_id": "e", "semantic_id": [1, 2], "popularity": 0, "title": "cap",
    }  # fmt: skip
    gone = came.updated(
        base.check(changes(*({"item_id": item, "op": "remove"} for item in ("e", "a", "never there"))), "2")
    )
    assert gone.gone.tolist() == [0, 4]
    assert gone.table.equals(came.table)
    back = gone.updated(base.check(changes({"item_id": "e", "price": 2.0, "op": None}), "3"))
    assert (back.gone.tolist(), back.table["title"][4], back.table["price"][4], back.revision) == ([0], "cap", 2.0, 3)


def test_items_that_come_do_not_have_those_of_the_bundle_copied(base) -> None:
    catalogue = base.catalogue
    for row, item in enumerate("efg", 4):
        item_ids = catalogue.item_ids
        catalogue = catalogue.updated(base.check(changes({"item_id": item, "semantic_id": [1, 2]}), item))
        assert catalogue.item_ids._of_bundle is base.catalogue.item_ids._of_bundle
        assert (list(item_ids), item in item_ids) == (list("abcdefg"[:row]), False)
        assert (catalogue.item_ids[row], catalogue.item_ids[-1], catalogue.item_ids.row_of(item)) == (item, item, row)
    assert catalogue.item_ids.rows_of(["a", "g", "x"]).tolist() == [0, 6, -1]


def test_what_comes_before_its_id_waits_for_it(base) -> None:
    early = base.check(changes({"item_id": "e", "price": 5.0}), "1")
    assert list(base.catalogue.updated(early).item_ids) == list("abcd")
    late = base.check(changes({"item_id": "e", "semantic_id": [2, 2], "title": "cap"}), "2")
    catalogue = base.catalogue.updated(CatalogueChanges.merged([early.only(late.ids["item_id"]), late]))
    assert (catalogue.table["price"][4], catalogue.table["title"][4], catalogue.revision) == (5.0, "cap", 1)


WRONG = [
    ({"itemid": "a"}, r"item_id is missing: every row needs it; the table has itemid"),
    ({"item_id": "a", "popularity": 3}, r"popularity comes with the bundle"),
    ({"item_id": None}, r"item_id is null or empty \(1 row, first 1\)"),
    ({"item_id": "x" * 513}, r"item_id has more than 512 characters"),
    ({"item_id": "good"}, r"item_id stands in an earlier row, too"),
    ({"item_id": "a", "op": "delete"}, r"op is neither 'upsert' nor 'remove' \(1 row, first 1\)"),
    ({"item_id": "a", "price": float("inf")}, r"price is NaN or infinite"),
    ({"item_id": "a", "fields": ["price"]}, r"fields names what is no attribute column of this table"),
    ({"item_id": "e", "semantic_id": [1]}, r"semantic_id is no ID of this bundle, which has codebooks of 3, 4 codes"),
    ({"item_id": "e", "semantic_id": [1, 4]}, r"no ID of this bundle"),
    ({"item_id": "e", "semantic_id": [-1, 0]}, r"no ID of this bundle"),
    ({"item_id": "e", "semantic_id": [1, None]}, r"no ID of this bundle"),
    ({"item_id": "e", "semantic_id": [1, 1, 1]}, r"no ID of this bundle"),
    ({"item_id": "a", "semantic_id": [0, 1]}, r"semantic_id differs from the ID that the item has"),
]


@pytest.mark.parametrize(("row", "told"), WRONG)
def test_what_is_refused(base, row, told) -> None:
    first = {"item_id": "good", "semantic_id": [1, 1]} if "item_id" in row else {}
    with pytest.raises(DataError, match=told):
        base.check(changes(first, row), "stock.parquet")


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pl.Series("price", ["cheap"]), r"price is String, which cannot be read as Float64, as the catalogue has it"),
        (pl.Series("in_stock", [1]), r"in_stock is Int64, which cannot be read as Boolean"),
        (pl.Series("semantic_id", [[0.0, 0.0]]), r"semantic_id is List\(Float64\), not list<int32>"),
        (pl.Series("semantic_id", [[2**63, 0]], pl.List(pl.UInt64())), r"semantic_id is no ID of this bundle"),
        (pl.Series("op", [1.5]), r"op is Float64, which cannot be read as String \(upsert or remove\)"),
    ],
)
def test_other_types_are_refused(base, column, told) -> None:
    with pytest.raises(DataError, match=told):
        base.check(ChangesFile(pl.DataFrame([pl.Series("item_id", ["a"]), column])), "1")


def test_types_that_lose_nothing_are_read(base) -> None:
    table = pl.DataFrame({"item_id": [1], "price": [3], "brand": pl.Series(["acme"], dtype=pl.Categorical)})
    items = base.check(ChangesFile(table), "1")
    assert items.removed["item_id"].to_list() == ["1"]
    assert items.attributes["price"]["value"].to_list() == [3.0]
    large = pa.table({"item_id": ["e"], "semantic_id": pa.array([[1, 1]], pa.list_(pa.int64(), 2))})
    assert base.check(ChangesFile(pl.DataFrame(large)), "1").ids["value"].to_list() == [[1, 1]]


def test_every_problem_is_told_at_once(base) -> None:
    rows = ({"item_id": None, "popularity": 1, "op": "x"}, {"item_id": "e", "semantic_id": [9, 9]})
    with pytest.raises(DataError) as told:
        base.check(changes(*rows), "stock.parquet")
    lines = str(told.value).splitlines()
    assert lines[0] == "stock.parquet: refused whole, nothing of it was applied:"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["stock.parquet:", name] for name in ("popularity", "item_id", "op", "semantic_id")
    ]


def test_reserved_slots_are_no_items() -> None:
    reserving = checker(bundle(reserved_slots=(0, 2)))
    for codes in ([0, 2], [1, 3]):
        with pytest.raises(DataError, match="holds a reserved slot"):
            reserving.check(changes({"item_id": "e", "semantic_id": codes}), "1")
    came = reserving.catalogue.updated(reserving.check(changes({"item_id": "e", "semantic_id": [1, 1]}), "1"))
    built = Catalogue.open(replace(bundle(reserved_slots=(0, 2)), table=came.table))
    assert same_index(came, built)


def test_a_full_leaf(shop) -> None:
    capped = checker(bundle(leaf_cap=2))
    row = {"item_id": "e", "semantic_id": [0, 0]}
    assert capped.check(changes(row), "1").unlisted == 1
    assert capped.check(changes(row, {"item_id": "a", "op": "remove"}), "1").unlisted == 0
    with pytest.raises(DataError, match=r"as many items as a response lists of one \(2\)"):
        replace(capped, strict=True).check(changes(row), "1")


def test_attributes_of_another_bundle_are_passed_over_and_the_rest_counts(base) -> None:
    rows = (
        {"item_id": "a", "colour": "red", "price": 7.0, "fields": ["colour", "price"]},
        {"item_id": "b", "op": "remove"},
    )
    found = base.check(changes(*rows), "1")
    assert (found.unknown, set(found.attributes)) == ({"colour"}, {"price"})
    catalogue = base.catalogue.updated(CatalogueChanges.merged([found]))
    assert (catalogue.gone.tolist(), catalogue.table["price"][0]) == ([1], 7.0)
    told = r"colour is no attribute of this catalogue, which has brand, categories, "
    with pytest.raises(DataError, match=told):
        replace(base, strict=True).check(changes(*rows), "1")


def test_a_call_must_bring_an_id(base) -> None:
    strict = replace(base, strict=True)
    with pytest.raises(DataError, match=r"item_id is not in the catalogue and has no semantic_id.*first 1\)"):
        strict.check(changes({"item_id": "a", "price": 1.0}, {"item_id": "e", "price": 1.0}), "1")
    assert strict.check(changes({"item_id": "e", "op": "remove"}), "1").removed["value"].to_list() == [True]


def test_ids_of_other_codebooks_are_passed_over() -> None:
    ours = checker(bundle(files={CODEBOOKS: "one"}))
    file = changes({"item_id": "e", "semantic_id": [9, 9, 9]}, {"item_id": "a", "price": 1.0, "semantic_id": [2, 2]})
    with pytest.raises(DataError, match="no ID of this bundle"):
        ours.check(replace(file, codebooks="one"), "1")
    found = ours.check(replace(file, codebooks="other"), "1")
    assert not len(found.ids)
    assert ours.catalogue.updated(found).table["price"].to_list() == [1.0, 20.0, 30.0, None]


def keyword_shop(*, numbered: bool) -> InMemory:
    words = (Keyword("acme", AttributeType.BRAND), Keyword("shoe", AttributeType.ENTITY))
    groups = ((AttributeType.BRAND,), (AttributeType.ENTITY,))
    codebook = KeywordCodebook(KeywordDictionary(words), groups, np.ones(2, np.int32), (3, 3), (1, 1))
    sizes = (3, 3, 4) if numbered else (3, 3)
    codes = [[1, 1], [0, 1], [1, 0], [0, 0]]
    numbers = [[2], [0], [0], [0]] if numbered else [[]] * 4
    table = TABLE.with_columns(pl.Series("semantic_id", [c + n for c, n in zip(codes, numbers, strict=True)], CODES))
    reserved = (1, 1, 0) if numbered else (1, 1)
    made = bundle(table, codebook_sizes=sizes, reserved_slots=reserved, dedup_level=numbered)
    return replace(made, keywords=codebook)


def test_words_make_an_id_where_they_are_all_of_it() -> None:
    found = checker(keyword_shop(numbered=False)).check(
        changes({"item_id": "e", "brand": "Acme", "title": "running shoes"}, {"item_id": "f", "price": 3.0}), "1"
    )
    assert found.ids.rows() == [("e", [1, 1])]


def test_items_of_equal_words_are_numbered_where_the_bundle_does_so() -> None:
    numbered = checker(keyword_shop(numbered=True))
    rows = [{"item_id": item, "title": "acme shoe"} for item in "efg"] + [{"item_id": "h", "title": "acme socks"}]
    assert numbered.check(changes(*rows), "1").ids["value"].to_list() == [[1, 1, 3], [1, 1, 3], [1, 1, 3], [1, 0, 1]]
    with pytest.raises(DataError, match="texts make none"):
        replace(numbered, strict=True).check(changes({"item_id": "e", "title": "socks"}), "1")


def test_files_say_what_they_are(tmp_path: Path) -> None:
    file = replace(
        changes({"item_id": "a", "price": 1.0}), codebooks="one", n_sets=3, merges=("x",), call={"by": "ann"}
    )
    path = tmp_path / "1.parquet"
    file.write(path)
    read = ChangesFile.read(path)
    assert read.table.equals(file.table)
    assert replace(read, table=file.table) == file
    assert [entry.name for entry in tmp_path.iterdir()] == ["1.parquet"]
    pq.write_table(pa.table({"item_id": ["a"]}), path)
    assert ChangesFile.read(path).n_sets == 1


def test_a_full_disk_is_no_fault_of_the_format(tmp_path: Path) -> None:
    (tmp_path / ".1.parquet.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        changes({"item_id": "a", "price": 1.0}).write(tmp_path / "1.parquet")
    assert list(tmp_path.iterdir()) == []


TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda time: time.replace(tzinfo=UTC))


@given(TIMES, st.sampled_from(["-stock", "Z-stock", ".5Z-stock", "~", " z", ".parquet"]))
def test_a_name_made_behind_another_sorts_behind_it(time: datetime, rest: str) -> None:
    theirs, ours = f"{time:%Y%m%dT%H%M%S}{rest}.parquet", file_name(time, "zz")
    for name, step in ((theirs, timedelta(seconds=1)), (ours, timedelta(microseconds=1))):
        after = time_after(name)
        assert after is not None
        assert file_name(after, "aa") > name
        assert after <= time + step
    assert time_after("stock.parquet") is None


@given(TIMES, st.timedeltas(-3 * AHEAD, 3 * AHEAD))
def test_a_file_is_early_by_its_time_alone(now: datetime, ahead: timedelta) -> None:
    time = (now + ahead).replace(microsecond=0)
    whole = (now + AHEAD).replace(microsecond=0)
    for name in (file_name(time, "x"), f"{time:%Y%m%dT%H%M%S}-stock.parquet"):
        assert early(["99999999T999999-x.parquet", "x.parquet", name], now) == ([name] if time > whole else [])


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b[:8] + b"\0" * 60 + b[68:]])
def test_damaged_files_are_refused(tmp_path: Path, damage) -> None:
    path = tmp_path / "1.parquet"
    changes(*({"item_id": str(n), "price": 1.0} for n in range(50))).write(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"1\.parquet cannot be read as Parquet"):
        ChangesFile.read(path)


def test_metadata_of_others_is_refused_when_it_is_ours_by_name(tmp_path: Path) -> None:
    path = tmp_path / "1.parquet"
    pq.write_table(pa.table({"item_id": ["a"]}).replace_schema_metadata({"genretrieval": "not JSON"}), path)
    with pytest.raises(DataError, match="cannot be read"):
        ChangesFile.read(path)


class ByCodes:
    """Scores every leaf by its codes, wherever the index has it."""

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        codes = np.zeros((1, 0), np.int64)
        for level in range(len(SIZES)):
            starts = inputs[f"child_start_{level}"]
            parents = np.repeat(np.arange(len(codes)), np.diff(starts))
            codes = np.column_stack([codes[parents], inputs[f"token_{level}"][: len(parents)]])
        allowed = inputs[f"allowed_{len(SIZES) - 1}"][inputs["mask_row"]][:, : len(codes)]
        n_beams = len(inputs["beams"])
        scores = np.full((len(allowed), n_beams), -2e9, np.float32)
        leaves = np.zeros((len(allowed), n_beams), np.int64)
        of_codes = -np.asarray([(17 * a + 5 * b) % 23 for a, b in codes.tolist()], np.float32)
        for row, open_ in enumerate(allowed):
            best = np.flatnonzero(open_)[np.argsort(-of_codes[open_], kind="stable")][:n_beams]
            leaves[row, : len(best)], scores[row, : len(best)] = best, of_codes[best]
        return Leaves(leaves, scores, np.repeat(scores[..., None] / 2, 2, axis=-1))


def same_index(one: Catalogue, other: Catalogue) -> bool:
    def parts(catalogue: Catalogue) -> list[Any]:
        values = [getattr(catalogue.index, field.name) for field in fields(catalogue.index)]
        return [np.asarray(part).tolist() for v in values for part in (v if isinstance(v, tuple) else (v,))]

    return parts(one) == parts(other)


ATTRIBUTES = {
    "price": st.none() | st.sampled_from([1.0, 15.0, 40.0]),
    "brand": st.none() | st.sampled_from(["acme", "umbra"]),
    "in_stock": st.none() | st.booleans(),
}
ROWS = st.dictionaries(
    st.sampled_from(list("abcdefgh")),
    st.fixed_dictionaries(
        {"op": st.sampled_from(["upsert", "upsert", "remove"]), "bring": st.booleans()}, optional=ATTRIBUTES
    ),
    max_size=5,
)
# The ID that each item would have, if it came.
BORN = {item: [ord(item) % 3, ord(item) % 4] for item in "efgh"}


def as_file(rows: dict[str, dict[str, Any]]) -> ChangesFile:
    made = []
    for item, row in rows.items():
        given = {name: row[name] for name in ATTRIBUTES if name in row}
        brought = BORN.get(item) if row["bring"] else None
        made.append({"item_id": item, "op": row["op"], "semantic_id": brought, **given, "fields": list(given)})
    return changes(*made) if made else changes({"item_id": "nobody", "op": "remove"})


def expected(sets: list[dict[str, dict[str, Any]]]) -> tuple[pl.DataFrame, list[str]]:
    """The table of a bundle that was exported after all changes, and the items that are gone."""
    state = {row["item_id"]: dict(row) for row in TABLE.iter_rows(named=True)}
    known, waiting, gone = list(state), {}, set()
    for rows in sets:
        for item, row in rows.items():
            to = state.setdefault(item, dict.fromkeys(TABLE.columns) | {"item_id": item, "popularity": 0})
            to.update({name: row[name] for name in ATTRIBUTES if name in row})
            waiting[item] = row["op"]
            if row["bring"] and item in BORN and item not in known:
                known.append(item)
                to["semantic_id"] = BORN[item]
            (gone.add if row["op"] == "remove" else gone.discard)(item)
    table = pl.DataFrame([state[item] for item in known], dict(TABLE.schema))
    return table, [item for item in known if item in gone]


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(0, 5))
def test_any_sequence_comes_to_a_catalogue_built_at_once(shop, base, sets, cut) -> None:
    checked = [base.check(as_file(rows), str(n)) for n, rows in enumerate(sets)]
    table, gone = expected(sets)
    built = Catalogue.open(replace(shop, table=table))
    for groups in ([checked], [checked[:cut], checked[cut:]], [[one] for one in checked]):
        catalogue, waiting = base.catalogue, []
        for group in filter(None, groups):
            merged = CatalogueChanges.merged(group)
            early = [part.only(merged.ids["item_id"]) for part in waiting]
            catalogue = catalogue.updated(CatalogueChanges.merged([*early, merged]))
            waiting.append(merged)
        assert catalogue.table.equals(table)
        assert catalogue.ids.codes.tolist() == built.ids.codes.tolist()
        assert same_index(catalogue, built)
        assert [catalogue.item_ids[row] for row in catalogue.gone] == gone
        assert catalogue.revision == len(sets)
        assert catalogue.item_ids.rows_of(list(catalogue.item_ids)).tolist() == list(range(len(catalogue.item_ids)))
    written = ChangesFile(CatalogueChanges.merged(checked).table())
    assert base.catalogue.updated(base.check(written, "merged")).table.equals(table)
    assert base.catalogue.updated(base.check(written, "merged")).gone.tolist() == catalogue.gone.tolist()

    left = table.filter(~pl.col("item_id").is_in(gone))
    if len(left):
        once = Retriever(replace(shop, table=left), ByCodes())
        live = Retriever(shop, ByCodes()).on(catalogue)
        filters = (None, Filters(in_stock=True), Filters(max_price=20.0), Filters(attributes={"brand": ["acme"]}))
        requests = [RetrieveRequest(filters=given, top_k=k) for given in filters for k in (1, 20)]
        assert answers(live.retrieve(requests)) == answers(once.retrieve(requests))
        assert {response.catalogue_revision for response in live.retrieve(requests)} == {len(sets)}


def answers(responses: list[Any]) -> str:
    return json.dumps([[item.model_dump() for item in response.items] for response in responses])


def test_items_that_come_have_the_vectors_of_those_like_them(base) -> None:
    vectors = np.arange(4 * 2 * 2, dtype=np.float32).reshape(4, 2, 2)
    shop = replace(bundle(), vectors=vectors)
    retriever = Retriever(shop, ByCodes())
    rows = [{"item_id": item, "semantic_id": codes} for item, codes in (("e", [0, 0]), ("f", [0, 2]), ("g", [1, 1]))]
    catalogue = base.catalogue.updated(base.check(changes(*rows), "1"))
    dense = retriever.on(catalogue).dense
    means = [vectors[[0, 1]].mean(0), vectors[[0, 1, 2]].mean(0), vectors.mean(0)]
    for part, found in enumerate((dense.read, dense.ranked)):
        assert found[np.asarray([[4, 5], [6, 3]])].tolist() == [
            [means[0][part].tolist(), means[1][part].tolist()],
            [means[2][part].tolist(), vectors[3, part].tolist()],
        ]
        assert len(found) == 7
        asked = np.asarray([[1, 2], [3, -1]], np.float32)
        np.testing.assert_allclose(found.products(asked), asked @ found[np.arange(7)].T)
    assert dense.candidates.tolist() == list(range(7))
    again = retriever.on(catalogue).on(base.catalogue.updated(base.check(changes(rows[2], rows[0]), "1"))).dense
    assert again.read[np.asarray([4, 5])].tolist() == [means[2][0].tolist(), means[0][0].tolist()]
