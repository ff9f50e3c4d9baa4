"""What selectors find, what is refused, what is left out, and what a change resolves anew."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.catalogue import build_index
from genretrieval.catalogue_changes import CatalogueChanges
from genretrieval.edits import NO_EDITS
from genretrieval.errors import RequestError
from genretrieval.item_ids import ItemIds
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.request import RetrieveRequest
from genretrieval.semantic_ids import SemanticIds
from genretrieval.servable import Catalogue
from genretrieval_serving.admin import snapshot as snapshot_module
from genretrieval_serving.admin.resources import KeywordFields, RuleFields, Selector, SynonymsFields
from genretrieval_serving.admin.snapshot import MAX_REPETITIONS, AdminSnapshot, Items
from genretrieval_serving.admin.store import Changes

SLOT = {"level": 0, "code": 7}
BLOCK = {"kind": "block", "items": {"item_ids": ["item-1"]}}


def catalogue_of(**columns) -> Catalogue:
    n = len(next(iter(columns.values())))
    table = pl.DataFrame({"item_id": [str(row) for row in range(n)], **columns})
    ids = SemanticIds(np.zeros((n, 1), np.int32), (4,))
    return Catalogue(table, ids, build_index(ids), ItemIds(table["item_id"]))


SHOP = catalogue_of(
    title=["Red shoe, size 42", "Snowshoe", "RED  Shoe polish", None, "外套 黑色", "shoe red"],
    brand=["Acme", None, "Red", "The Red Shoe Company", "Acme", "Umbra"],
    categories=[["shoes"], ["sport", "snow gear"], [], None, ["黑色外套"], ["gear"]],
    price=[10.0, 20.0, None, 40.0, 50.0, 60.0],
)


def on(snapshot: AdminSnapshot, catalogue: Catalogue, reserved: Sequence[int]) -> AdminSnapshot:
    """The same state on another catalogue."""
    items = Items(catalogue, reserved)
    return AdminSnapshot(items, snapshot.revision, snapshot.resources, {}, {}).on(items)


def test_texts_of_rows_that_did_not_change_are_kept(monkeypatch) -> None:
    marked = []
    original = snapshot_module.with_edges
    monkeypatch.setattr(snapshot_module, "with_edges", lambda text: marked.append(text) or original(text))
    items = Items(SHOP)
    wanted = Selector(text="red shoe")
    assert items.rows(wanted).tolist() == [0, 2, 3]
    marked.clear()
    more = catalogue_of(
        title=["Red shoe, size 42", "Red shoe", "RED  Shoe polish", None, "外套 黑色", "shoe red", "red shoes"],
        brand=["Acme", None, "Red", None, "Acme", "Umbra", None],
        categories=[["shoes"], ["sport", "snow gear"], [], None, ["黑色外套"], ["gear"], None],
    )
    changed = items.on(more)
    assert changed.prepare().to_list() == Items(more).prepare().to_list()
    assert changed.rows(wanted).tolist() == [0, 1, 2, 6]
    marked.clear()
    # Back to fewer rows, and the first state is as it was.
    fewer = items.on(SHOP)
    assert fewer.rows(wanted).tolist() == [0, 2, 3]
    assert set(marked) == {"snowshoe", "sport", "snow gear", "the red shoe company", "red shoe"}
    assert items.rows(wanted).tolist() == [0, 2, 3]
    # Other columns: nothing of it can be kept.
    assert items.on(catalogue_of(title=["red shoe"])).rows(wanted).tolist() == [0]


def test_what_a_later_state_of_the_catalogue_cannot_change_is_not_looked_for_again(
    snapshot_of, stored, noon, monkeypatch
) -> None:
    def block(**items: Any) -> dict[str, Any]:
        return {"kind": "block", "items": items}

    before = snapshot_of(
        bound(stored, items=("item-1", "item-2")),
        stored("rules/pin", effect={"kind": "pin", "items": [{"item_id": "item-3", "position": 1}]}),
        stored("rules/arrives", effect=block(item_ids=["item-1", "later"])),
        stored("rules/cheap", effect=block(filters={"max_price": 1})),
        stored("rules/word", effect=block(text="acme")),
        stored("rules/broken", effect=BLOCK, condition={"query": {"match": "regex", "text": "("}}),
        stored("synonyms/s", kind="two_way", terms=["a", "b"]),
    )
    catalogue = before.items.catalogue
    price = pl.when(pl.col("item_id") == "item-20").then(0.5).otherwise(pl.col("price")).alias("price")
    table, grown = catalogue.table.with_columns(price), catalogue.item_ids.with_more(["later"])
    more = replace(catalogue, table=table.extend(table[7].with_columns(item_id=pl.lit("later"))), item_ids=grown)
    compiled = []
    original = snapshot_module._compile
    monkeypatch.setattr(snapshot_module, "_compile", lambda name, *rest: compiled.append(name) or original(name, *rest))
    after = before.on(before.items.on(more))
    assert sorted(compiled) == ["rules/arrives", "rules/cheap", "rules/word"]
    assert (after.revision, after.broken, after.resources) == (before.revision, before.broken, before.resources)
    request = RetrieveRequest(query="new")
    old, new = before.edits(request, noon), after.edits(request, noon)
    assert set(new.blocked.tolist()) - set(old.blocked.tolist()) == {20, grown.row_of("later")}
    assert new.bound[0].rows is old.bound[0].rows
    assert (new.pins, new.applied) == (old.pins, old.applied)


def test_what_operators_named_stays_named_when_a_late_file_moves_rows(snapshot_of, stored, noon) -> None:
    def came(*items: str) -> CatalogueChanges:
        codes = pl.Series("value", [[1, 1, 1]] * len(items), pl.List(pl.Int32()))
        named = pl.Series("item_id", items)
        removed = pl.Series("value", [False] * len(items))
        return CatalogueChanges(pl.DataFrame([named, removed]), pl.DataFrame([named, codes]), {})

    empty = snapshot_of()
    exported = empty.items.catalogue
    shown = exported.updated(came("recalled"))
    before = empty.on(empty.items.on(shown)).updated(
        Changes(
            1,
            [
                bound(stored, items=("recalled",)),
                stored("rules/block", effect={"kind": "block", "items": {"item_ids": ["recalled"]}}),
                stored("rules/pin", effect={"kind": "pin", "items": [{"item_id": "recalled", "position": 1}]}),
            ],
        )
    )
    request = RetrieveRequest(query="new")
    for state in (shown.updated(came("fresh")), exported.updated(came("fresh", "recalled"))):
        after = before.on(before.items.on(state))
        edits, row = after.edits(request, noon), state.item_ids.row_of("recalled")
        assert (edits.blocked.tolist(), edits.bound[0].rows.tolist(), edits.pins[0].row) == ([row], [row], row)
        assert state.keeps_rows_of(shown) == (row == shown.item_ids.row_of("recalled"))


@pytest.mark.parametrize(
    ("selector", "rows"),
    [
        ({"item_ids": ["5", "1", "1", "gone"]}, [1, 5]),
        ({"item_ids": ["gone"]}, []),
        ({"text": "red shoe"}, [0, 2, 3]),
        ({"text": "RED SHOE"}, [0, 2, 3]),
        ({"text": "snow"}, [1]),
        ({"text": "gear"}, [1, 5]),
        # Not from the end of one field into the next.
        ({"text": "polish red"}, []),
        ({"text": "sport snow"}, []),
        ({"text": "外"}, [4]),
        ({"text": "nothing"}, []),
        ({"filters": {"attributes": {"brand": ["Acme"]}}}, [0, 4]),
        ({"filters": {"min_price": 15, "max_price": 45}}, [1, 3]),
        ({"text": "red shoe", "filters": {"max_price": 15}}, [0]),
    ],
)
def test_a_selector_finds(selector, rows) -> None:
    found = Items(SHOP).rows(Selector.model_validate(selector))
    assert found.dtype == np.int64
    assert found.tolist() == rows


words = st.text(st.sampled_from("ab1. -é外套"), max_size=8)


@given(st.lists(st.tuples(words, words, st.lists(words, max_size=2)), min_size=1, max_size=4), words)
def test_text_is_found_where_a_keyword_would_be(rows, text) -> None:
    if not any(map(str.isalnum, text)):
        return
    titles, brands, categories = map(list, zip(*rows, strict=True))
    columns = {"title": titles, "brand": brands, "categories": pl.Series(categories, dtype=pl.List(pl.String))}
    keyword = KeywordDictionary((Keyword(text, AttributeType.ENTITY),))
    expected = [
        row
        for row, (title, brand, categories_) in enumerate(rows)
        if any(map(keyword.match, [title, brand, *categories_]))
    ]
    assert Items(catalogue_of(**columns)).rows(Selector(text=text)).tolist() == expected


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        (KeywordFields(text="new"), []),
        (KeywordFields(text="new", binding={"items": {"text": "nothing has this"}}), []),
        (KeywordFields(text="new", binding={"items": {"item_ids": ["gone"]}}), []),
        (
            KeywordFields(
                text="!?",
                binding={
                    "items": {
                        "text": "-",
                        "filters": {"attributes": {"colour": ["red"], "size": ["1"]}, "min_price": 1},
                    }
                },
            ),
            ["text: '!?' has no letter", "binding.items.text: '-'", "attribute 'colour'", "attribute 'size'"],
        ),
        (
            RuleFields(
                condition={"query": {"match": "regex", "text": "("}},
                effect={"kind": "boost", "amount": 1, "items": {"filters": {"attributes": {"colour": ["red"]}}}},
            ),
            ["condition.query.text: this regex does not compile (unclosed group)", "effect.items.filters: filter on"],
        ),
        (RuleFields(condition={"query": {"match": "contains", "text": "..."}}, effect=BLOCK), ["no letter or digit"]),
        (RuleFields(effect={"kind": "pin", "items": [{"item_id": "gone", "position": 1}]}), []),
        (SynonymsFields(kind="one_way", terms=["a", "?"]), ["terms.1: '?' has no letter"]),
        (SynonymsFields(kind="two_way", terms=["Shoe", "SHOE", "boot"]), ["two are equal once normalised"]),
    ],
)
def test_every_problem_is_named(snapshot_of, fields, problems) -> None:
    if not problems:
        snapshot_of().validate(fields)
        return
    with pytest.raises(RequestError) as refused:
        snapshot_of().validate(fields)
    for problem in problems:
        assert problem in str(refused.value)
    assert str(refused.value).count("; ") >= len(problems) - 1


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (r"^(red|blue) \w+$", None),
        (r"\d{4}", None),
        (r"(\d{1,4}[.,]?){20}", None),
        (r"\x{2014}\{5000\}", None),
        (r"(?=a)", "does not compile"),
        (r"(a)\1", "does not compile"),
        (r"[", "does not compile"),
        (r"a{101}", f"multiply to 101; at most {MAX_REPETITIONS}"),
        (r"((a{10}){10}){10}", "multiply to 1000"),
        (r"(a{2,60}){3,}", "multiply to 180"),
    ],
)
def test_regexes_are_bounded(snapshot_of, pattern, problem) -> None:
    fields = RuleFields(condition={"query": {"match": "regex", "text": pattern}}, effect=BLOCK)
    if problem is None:
        snapshot_of().validate(fields)
    else:
        with pytest.raises(RequestError, match=problem):
            snapshot_of().validate(fields)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        (KeywordFields(text="new", binding={"items": {"item_ids": ["x", "item-1", "y", "x"]}}), ["x", "y"]),
        (KeywordFields(text="new", binding={"items": {"text": "x"}}), []),
        (KeywordFields(text="new"), []),
        (RuleFields(effect={"kind": "block", "items": {"item_ids": ["z", "item-2"]}}), ["z"]),
        (RuleFields(effect={"kind": "pin", "items": [{"item_id": "p", "position": 2}]}), ["p"]),
        (SynonymsFields(kind="one_way", terms=["a", "b"]), []),
    ],
)
def test_ids_that_the_catalogue_does_not_have(snapshot_of, fields, missing) -> None:
    assert snapshot_of().missing(fields) == missing


def bound(stored, name="keywords/new", text="new", items=("item-3", "item-1"), **fields):
    return stored(name, text=text, binding={"items": {"item_ids": list(items)}}, slot=SLOT, **fields)


def test_a_change_resolves_what_changed_and_nothing_else(snapshot_of, stored, noon, monkeypatch) -> None:
    before = snapshot_of(bound(stored), stored("rules/r", effect=BLOCK), stored("rules/gone", effect=BLOCK))
    resolved = []
    rows = Items.rows
    monkeypatch.setattr(Items, "rows", lambda self, selector: resolved.append(selector) or rows(self, selector))
    deleted = stored("rules/gone", effect=BLOCK, deleted_at=noon)
    other = stored("rules/r", effect={"kind": "block", "items": {"item_ids": ["item-2"]}})
    after = before.updated(Changes(8, [other, deleted]))
    assert [selector.item_ids for selector in resolved] == [["item-2"]]
    request = RetrieveRequest(query="new")
    old, new = before.edits(request, noon), after.edits(request, noon)
    assert (old.blocked.tolist(), old.applied, old.revision) == ([1], ("rules/gone", "rules/r", "keywords/new"), 7)
    assert (new.blocked.tolist(), new.applied, new.revision) == ([2], ("rules/r", "keywords/new"), 8)
    # The very array: masks are found again by it.
    assert new.bound[0].rows is old.bound[0].rows
    back = after.updated(Changes(9, [stored("rules/gone", effect=BLOCK)]))
    assert back.edits(request, noon).blocked.tolist() == [1, 2]


def test_another_catalogue_resolves_everything(snapshot_of, stored, noon) -> None:
    snapshot = snapshot_of(bound(stored, items=("0", "item-1")))
    moved = on(snapshot, SHOP, (2,))
    assert moved.revision == snapshot.revision
    assert moved.broken == {"keywords/new": "slot: the bundle reserves no slot 7 on level 0; bind the keyword again"}
    other = stored("keywords/new", text="new", slot={"level": 0, "code": 3}, binding={"items": {"item_ids": ["0"]}})
    kept = on(snapshot.updated(Changes(8, [other])), SHOP, (2,))
    assert kept.edits(RetrieveRequest(query="new"), noon).bound[0].rows.tolist() == [0]


def test_what_cannot_hold_on_another_bundle_is_listed(snapshot_of, stored, reserved) -> None:
    attribute = {"kind": "bury", "amount": 1, "items": {"filters": {"attributes": {"brand": ["acme"]}}}}
    snapshot = snapshot_of(
        bound(stored),
        stored("keywords/rule", text="rule", slot={"level": 0, "code": 6}, binding={"items": {"text": "nothing"}}),
        stored("keywords/unbound", text="free"),
        stored("rules/attribute", effect=attribute),
        stored("rules/off", effect=attribute, enabled=False),
        stored("rules/pin", effect={"kind": "pin", "items": [{"item_id": "gone", "position": 1}]}),
    )
    assert snapshot.problems() == []
    bare = catalogue_of(title=["a"])
    assert on(snapshot, bare, ()).problems() == [
        "keywords/new: slot: the bundle reserves no slot 7 on level 0; bind the keyword again",
        "keywords/rule: slot: the bundle reserves no slot 6 on level 0; bind the keyword again",
        "rules/attribute: effect.items.filters: filter on unknown attribute 'brand'; the catalogue has title",
    ]
    same_slots = catalogue_of(brand=["acme"])
    same_slots = replace(same_slots, ids=SemanticIds(np.zeros((1, 3), np.int32), (8, 8, 8)))
    assert on(snapshot, same_slots, reserved).problems() == [
        "keywords/new: binding.items: the catalogue has none of the 2 items"
    ]


@pytest.mark.parametrize(
    "resource",
    [
        {"name": "rules/bad", "effect": BLOCK, "condition": {"query": {"match": "regex", "text": "(new"}}},
        {"name": "rules/bad", "effect": {"kind": "block", "items": {"filters": {"attributes": {"colour": ["red"]}}}}},
        {"name": "keywords/bad", "text": "..", "slot": SLOT, "binding": {"items": {"item_ids": ["item-1"]}}},
        {"name": "keywords/bad", "text": "new", "slot": {"level": 2, "code": 7},
         "binding": {"items": {"item_ids": ["item-1"]}}},
        {"name": "synonyms/bad", "kind": "two_way", "terms": ["new", "."]},
    ],
)  # fmt: skip
def test_what_is_broken_is_left_out_and_the_rest_applies(snapshot_of, stored, noon, resource) -> None:
    name = resource["name"]
    good = stored("rules/good", effect=BLOCK)
    fields = {key: value for key, value in resource.items() if key != "name"}
    snapshot = snapshot_of(stored(name, **fields), good)
    assert set(snapshot.broken) == {name}
    assert snapshot.edits(RetrieveRequest(query="new"), noon).applied == ("rules/good",)
    kind, _ = stored(name, **fields)
    mended = snapshot.updated(Changes(8, [(kind, stored(name, **fields, deleted_at=noon)[1])]))
    assert mended.broken == {}


def test_what_fails_unforeseen_is_left_out_too(snapshot_of, stored, noon, monkeypatch) -> None:
    rows = Items.rows

    def failing(self, selector):
        if selector.text == "odd":
            raise pl.exceptions.ComputeError("odd")
        return rows(self, selector)

    monkeypatch.setattr(Items, "rows", failing)
    odd = stored("rules/odd", effect={"kind": "block", "items": {"text": "odd"}})
    snapshot = snapshot_of(odd, stored("rules/good", effect=BLOCK))
    assert snapshot.broken == {"rules/odd": "ComputeError: odd"}
    assert snapshot.edits(RetrieveRequest(), noon).applied == ("rules/good",)


def test_of_keywords_the_longest_in_force_is_found(snapshot_of, stored, noon) -> None:
    until = {"valid_until": noon.isoformat()}
    items = {"items": {"item_ids": ["item-1"]}}
    snapshot = snapshot_of(
        stored("keywords/long", text="red shoe", slot=SLOT, binding=items | until),
        stored("keywords/short", text="Shoe", slot={"level": 0, "code": 6}, binding=items),
    )

    def names(query, now):
        return [keyword.name for keyword in snapshot.edits(RetrieveRequest(query=query), now).bound]

    before = noon - timedelta(seconds=1)
    assert names("new RED shoe", before) == ["keywords/long"]
    assert names("new RED shoe", noon) == ["keywords/short"]
    assert names("shoe, red shoe, shoe", before) == ["keywords/short", "keywords/long"]
    assert names("snowshoe", before) == []


def has_no_z(text: str) -> bool:
    return "z" not in unicodedata.normalize("NFKC", text).casefold()


unmatched = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(has_no_z)


@given(query=st.none() | unmatched, scenario=st.none() | unmatched, past=st.booleans())
def test_a_request_that_matches_nothing_gets_no_edits(snapshot_of, stored, noon, query, scenario, past) -> None:
    conditions = [
        {"query": {"match": "exact", "text": "z"}},
        {"query": {"match": "contains", "text": "z"}},
        {"query": {"match": "regex", "text": "z+"}},
        {"scenarios": ["z"]},
        {"query": {"match": "regex", "text": ".*"}, "scenarios": ["z"]},
    ]
    rules = [stored(f"rules/{i}", effect=BLOCK, condition=condition) for i, condition in enumerate(conditions)]
    window = {"valid_from": noon, "valid_until": noon + timedelta(hours=1)}
    snapshot = snapshot_of(
        *rules,
        stored("rules/later", effect=BLOCK, **window),
        stored("rules/off", effect=BLOCK, enabled=False),
        stored("synonyms/s", kind="two_way", terms=["z", "a z"]),
        bound(stored, text="z"),
        stored("keywords/unbound", text="a"),
    )
    now = noon - timedelta(hours=1) if past else noon + timedelta(hours=1)
    edits = snapshot.edits(RetrieveRequest(query=query, scenario=scenario and scenario[:64]), now)
    assert replace(edits, revision=0) == NO_EDITS
    assert edits.revision == 7


def test_an_empty_snapshot_edits_nothing(catalogue, reserved, noon) -> None:
    assert AdminSnapshot.empty(Items(catalogue, reserved)).edits(RetrieveRequest(query="new"), noon) == NO_EDITS
