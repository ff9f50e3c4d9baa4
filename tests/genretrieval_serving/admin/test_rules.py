"""Every effect under every condition, as results show it; and which step comes before which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import polars as pl
import pytest
from numpy.typing import NDArray

from genretrieval.bundle import Bundle, Manifest
from genretrieval.features import RequestFeatures
from genretrieval.request import RetrievedItem, RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Retriever

# All items are returned, so that none comes or goes by being the 25th.
ALL = 24
ITEM, OTHER = "item-9", "item-14"


@dataclass(frozen=True)
class Reserving:
    """The bundle with two reserved slots on its first level."""

    bundle: Bundle
    manifest: Manifest

    def features(self) -> RequestFeatures:
        return self.bundle.features()

    def catalogue(self) -> pl.DataFrame:
        return self.bundle.catalogue()

    def item_vectors(self) -> NDArray[Any] | None:
        return None


@pytest.fixture
def retriever(bundle, backend, reserved) -> Retriever:
    manifest = bundle.manifest.model_copy(update={"reserved_slots": reserved})
    return Retriever(Reserving(bundle, manifest), backend)


# By name: the condition, requests that it is for, requests that it is not for. The clock says noon.
HOUR = timedelta(hours=1)
RED = {"query": "red hat"}
CONDITIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]] = {
    "always": ({}, [{}, RED], []),
    "exact": (
        {"condition": {"query": {"match": "exact", "text": "Red  Hat"}}},
        [RED, {"query": " RED hat "}],
        [{"query": "red hat box"}, {"query": "hat"}, {}],
    ),
    "contains": (
        {"condition": {"query": {"match": "contains", "text": "HAT"}}},
        [RED, {"query": "hat, red"}],
        [{"query": "chat"}, {"query": "hatbox"}, {}],
    ),
    "contains_unspaced": (
        {"condition": {"query": {"match": "contains", "text": "外套"}}},
        [{"query": "黑色外套女"}],
        [{"query": "外 套"}],
    ),
    "regex": (
        {"condition": {"query": {"match": "regex", "text": r"^Red\b|\d{2}$"}}},
        [RED, {"query": "hat 42"}],
        [{"query": "a red hat"}, {"query": "42 hats"}, {}],
    ),
    # What people type, or what that is normalised to.
    "regex_typed": (
        {"condition": {"query": {"match": "regex", "text": r"\bCrème S?HOES$"}}},
        [{"query": "crème hoes"}, {"query": "ＣＲÈＭＥ  shoes"}],
        [{"query": "creme shoe"}, {"query": "shoes"}],
    ),
    "regex_normalised": (
        {"condition": {"query": {"match": "regex", "text": r"^creme shoe$"}}},
        [{"query": "Crème shoes"}, {"query": "creme shoe"}],
        [{"query": "creme"}],
    ),
    "scenario": (
        {"condition": {"scenarios": ["home", "cart"]}},
        [{"scenario": "cart"}, RED | {"scenario": "home"}],
        [{"scenario": "search"}, RED],
    ),
    "query_and_scenario": (
        {"condition": {"query": {"match": "contains", "text": "red"}, "scenarios": ["home"]}},
        [RED | {"scenario": "home"}],
        [RED, {"scenario": "home"}, RED | {"scenario": "cart"}],
    ),
    "in_time": ({"valid_from": -HOUR, "valid_until": HOUR}, [{}], []),
    "from_now": ({"valid_from": 0 * HOUR}, [{}], []),
    "too_early": ({"valid_from": HOUR}, [], [{}, RED]),
    "until_now": ({"valid_until": 0 * HOUR}, [], [{}, RED]),
    "disabled": ({"enabled": False}, [], [{}, RED]),
}


def scores(response: RetrieveResponse) -> dict[str, float]:
    return {item.item_id: item.score for item in response.items}


def order(response: RetrieveResponse) -> list[str]:
    return [item.item_id for item in response.items]


def is_pinned(before: RetrieveResponse, after: RetrieveResponse) -> None:
    rest = [item for item in order(before) if item not in (ITEM, OTHER)]
    assert order(after) == [OTHER, *rest[:3], ITEM, *rest[3:]]


def is_shifted(amount: float) -> Callable[[RetrieveResponse, RetrieveResponse], None]:
    def check(before: RetrieveResponse, after: RetrieveResponse) -> None:
        expected = scores(before)
        expected[ITEM] += amount
        expected[OTHER] += amount
        assert scores(after) == pytest.approx(expected)
        assert list(scores(after).values()) == sorted(scores(after).values(), reverse=True)

    return check


def is_blocked(before: RetrieveResponse, after: RetrieveResponse) -> None:
    assert order(after) == [item for item in order(before) if item not in (ITEM, OTHER)]


EFFECTS: dict[str, tuple[dict[str, Any], Callable[[RetrieveResponse, RetrieveResponse], None]]] = {
    "pin": (
        {"kind": "pin", "items": [{"item_id": ITEM, "position": 5}, {"item_id": OTHER, "position": 1}]},
        is_pinned,
    ),
    "boost": ({"kind": "boost", "items": {"item_ids": [ITEM, OTHER]}, "amount": 0.7}, is_shifted(0.7)),
    "bury": ({"kind": "bury", "items": {"item_ids": [ITEM, OTHER]}, "amount": 2.5}, is_shifted(-2.5)),
    "block": ({"kind": "block", "items": {"item_ids": [ITEM, OTHER]}}, is_blocked),
}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_rule(retriever, snapshot_of, stored, noon, condition, effect) -> None:
    fields, matching, others = CONDITIONS[condition]
    fields = {key: noon + value if isinstance(value, timedelta) else value for key, value in fields.items()}
    content, holds = EFFECTS[effect]
    snapshot = snapshot_of(stored("rules/r", effect=content, **fields))
    requests = [RetrieveRequest(top_k=ALL, **request) for request in matching + others]
    plain = retriever.retrieve(requests)
    edits = [snapshot.edits(request, noon) for request in requests]
    # A batch: what is blocked for one request is not for its neighbour.
    edited = retriever.retrieve(requests, edits)
    for i, (before, after) in enumerate(zip(plain, edited, strict=True)):
        touched = [item.item_id for item in after.items if item.touched_by == ["rules/r"]]
        if i < len(matching):
            holds(before, after)
            assert after.applied == ["rules/r"]
            assert sorted(touched) == ([] if effect == "block" else [OTHER, ITEM])
        else:
            assert after.items == before.items
            assert (after.applied, touched) == ([], [])
        assert after.revision == 7


SYNONYMS: list[tuple[str, list[str], str | None, str | None]] = [
    # kind, terms, the query, what the model reads in its place
    ("two_way", ["couch", "sofa"], "red couch", "red couch sofa"),
    ("two_way", ["couch", "sofa"], "a SOFA", "a SOFA couch"),
    ("two_way", ["couch", "sofa", "two seater"], "sofa", "sofa couch two seater"),
    ("two_way", ["couch", "sofa", "two seater"], "Two  Seater", "Two  Seater couch sofa"),
    ("two_way", ["couch", "sofa"], "sofa couch", None),
    ("two_way", ["couch", "sofa"], "sofabed", None),
    ("two_way", ["couch", "sofa"], None, None),
    ("two_way", ["外套", "夹克"], "黑色外套", "黑色外套 夹克"),
    ("one_way", ["lipstick", "lip colour", "rouge"], "red lipstick", "red lipstick lip colour rouge"),
    ("one_way", ["lipstick", "lip colour", "rouge"], "lipstick rouge", "lipstick rouge lip colour"),
    ("one_way", ["lipstick", "lip colour", "rouge"], "red rouge", None),
]


@pytest.mark.parametrize(("kind", "terms", "query", "read"), SYNONYMS)
@pytest.mark.parametrize("enabled", [True, False])
def test_synonyms(snapshot_of, stored, noon, kind, terms, query, read, enabled) -> None:
    snapshot = snapshot_of(stored("synonyms/s", kind=kind, terms=terms, enabled=enabled))
    edits = snapshot.edits(RetrieveRequest(query=query), noon)
    assert edits.query == (read if enabled else None)
    if not enabled or query in (None, "sofabed", "red rouge"):
        assert edits.applied == ()
    else:
        assert edits.applied == ("synonyms/s",)


def test_synonym_sets_add_a_term_once_and_do_not_chain(snapshot_of, stored, noon) -> None:
    snapshot = snapshot_of(
        stored("synonyms/b", kind="two_way", terms=["sofa", "settee", "couch"]),
        stored("synonyms/a", kind="one_way", terms=["couch", "sofa", "divan"]),
        stored("synonyms/c", kind="one_way", terms=["divan", "ottoman"]),
    )
    edits = snapshot.edits(RetrieveRequest(query="couch"), noon)
    assert edits.query == "couch sofa divan settee"
    assert edits.applied == ("synonyms/a", "synonyms/b")


BINDINGS: list[tuple[str, dict[str, Any], str | None, bool]] = [
    ("in_the_query", {}, "buy a LABUBU doll", True),
    ("alone", {}, "labubu", True),
    ("inside_of_a_word", {}, "labubus2", False),
    ("other_query", {}, "doll", False),
    ("no_query", {}, None, False),
    ("in_time", {"valid_from": -HOUR, "valid_until": HOUR}, "labubu", True),
    ("from_now", {"valid_from": 0 * HOUR}, "labubu", True),
    ("too_early", {"valid_from": HOUR}, "labubu", False),
    ("until_now", {"valid_until": 0 * HOUR}, "labubu", False),
]


@pytest.mark.parametrize(("window", "query", "found"), [case[1:] for case in BINDINGS], ids=[c[0] for c in BINDINGS])
@pytest.mark.parametrize("items", [{"item_ids": [OTHER, ITEM, "gone"]}, {"filters": {"min_price": 9, "max_price": 9}}])
def test_a_binding(retriever, snapshot_of, stored, noon, window, query, found, items) -> None:
    window = {key: noon + value for key, value in window.items()}
    slot = {"level": 0, "code": 7}
    snapshot = snapshot_of(stored("keywords/labubu", text="Labubu", slot=slot, binding={"items": items} | window))
    request = RetrieveRequest(query=query, top_k=ALL)
    (before,) = retriever.retrieve([request])
    (after,) = retriever.retrieve([request], [snapshot.edits(request, noon)])
    if not found:
        assert after.items == before.items
        assert after.applied == []
        return
    stands_for = [OTHER, ITEM] if "item_ids" in items else [ITEM]
    n = len(stands_for)
    assert sorted(order(after)[:n]) == sorted(stands_for)
    assert order(after)[n:] == [item for item in order(before) if item not in stands_for]
    assert all(item.touched_by == ["keywords/labubu"] for item in after.items[:n])
    assert after.applied == ["keywords/labubu"]


def test_rules_see_the_query_as_it_was_asked_and_bindings_what_synonyms_made_of_it(snapshot_of, stored, noon) -> None:
    block = {"kind": "block", "items": {"item_ids": [ITEM]}}
    conditions = {name: {"query": {"match": "contains", "text": name}} for name in ("sneaker", "trainer", "doll")}
    binding = {"items": {"item_ids": [OTHER]}}
    snapshot = snapshot_of(
        *(stored(f"rules/{name}", effect=block, condition=condition) for name, condition in conditions.items()),
        stored("synonyms/s", kind="one_way", terms=["sneaker", "trainer", "running"]),
        stored("keywords/trainer", text="trainer", slot={"level": 0, "code": 7}, binding=binding),
        # Not from one added term into the next.
        stored("keywords/both", text="trainer running", slot={"level": 0, "code": 6}, binding=binding),
    )
    edits = snapshot.edits(RetrieveRequest(query="ＳＮＥＡＫＥＲ"), noon)
    assert edits.applied == ("rules/sneaker", "synonyms/s", "keywords/trainer")
    assert edits.query == "ＳＮＥＡＫＥＲ trainer running"


def test_of_rules_the_higher_priority_and_then_the_smaller_id_prevails(retriever, snapshot_of, stored, noon) -> None:
    def pin(name: str, item: str, position: int, priority: int = 0) -> Any:
        effect = {"kind": "pin", "items": [{"item_id": item, "position": position}]}
        return stored(f"rules/{name}", effect=effect, priority=priority)

    snapshot = snapshot_of(
        pin("b", "item-1", 1),
        pin("a", "item-2", 1),
        pin("z", "item-3", 1, priority=1),
        # An item stands in one place: that of the rule that prevails.
        pin("y", "item-3", 7),
    )
    request = RetrieveRequest(top_k=6)
    edits = snapshot.edits(request, noon)
    assert edits.applied == ("rules/z", "rules/a", "rules/b", "rules/y")
    assert [(pin.name, pin.row, pin.position) for pin in edits.pins] == [
        ("rules/z", 3, 0), ("rules/a", 2, 0), ("rules/b", 1, 0)
    ]  # fmt: skip
    (response,) = retriever.retrieve([request], [edits])
    assert order(response)[:3] == ["item-3", "item-2", "item-1"]


def test_effects_of_several_rules_add_up_and_a_block_undoes_a_pin(retriever, snapshot_of, stored, noon) -> None:
    snapshot = snapshot_of(
        stored("rules/boost", effect={"kind": "boost", "items": {"item_ids": [ITEM]}, "amount": 0.5}),
        stored("rules/bury", effect={"kind": "bury", "items": {"item_ids": [ITEM]}, "amount": 0.25}),
        stored("rules/one", effect={"kind": "block", "items": {"item_ids": ["item-3", "item-1"]}}),
        stored("rules/two", effect={"kind": "block", "items": {"item_ids": ["item-3", "item-2"]}}),
        stored("rules/pin", effect={"kind": "pin", "items": [{"item_id": "item-1", "position": 1}]}),
    )
    request = RetrieveRequest(top_k=ALL)
    edits = snapshot.edits(request, noon)
    assert edits.blocked.tolist() == [1, 2, 3]
    (before,), (after,) = retriever.retrieve([request]), retriever.retrieve([request], [edits])
    assert scores(after)[ITEM] == pytest.approx(scores(before)[ITEM] + 0.25)
    assert {"item-1", "item-2", "item-3"}.isdisjoint(order(after))
    touched: RetrievedItem = next(item for item in after.items if item.item_id == ITEM)
    assert touched.touched_by == ["rules/boost", "rules/bury"]


def test_a_regex_takes_time_in_proportion_to_the_query(snapshot_of, stored, noon) -> None:
    # A backtracking engine would not end within the age of the universe.
    effect = {"kind": "block", "items": {"item_ids": [ITEM]}}
    condition = {"query": {"match": "regex", "text": r"(a*)*(a*)*b$"}}
    snapshot = snapshot_of(stored("rules/r", effect=effect, condition=condition))
    assert snapshot.edits(RetrieveRequest(query="a" * 2048), noon).applied == ()
