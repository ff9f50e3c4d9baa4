"""What operators changed, as results show it: a catalogue of five items and a search that scores by a table."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from genretrieval.bundle import CATALOGUE, GRAPH, ITEM_VECTORS, KEYWORDS, Manifest, load_bundle, write_bundle
from genretrieval.candidates import batches, collapsed, in_order, with_blocks, with_pins
from genretrieval.edits import Boost, BoundKeyword, Edits, Pin
from genretrieval.features import RequestFeatures
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval.request import Filters, RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Leaves, Retriever

# Code 3 of either level is reserved. Leaves in sorted order: slot (0, 3), a, b, c, d and e, slot (3, 0).
TABLE = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d", "e"],
        "semantic_id": pl.Series([[1, 1], [1, 2], [2, 1], [2, 2], [2, 2]], dtype=pl.List(pl.Int32)),
        "popularity": [5, 4, 3, 2, 1],
        "price": [10.0, 20.0, 30.0, 40.0, 50.0],
    }
)
A, B, C, D, E = range(5)
CODEBOOK = KeywordCodebook(
    KeywordDictionary(
        tuple(Keyword(text, AttributeType.ENTITY) for text in ("shoe", "hat"))
        + tuple(Keyword(text, AttributeType.BRAND) for text in ("acme", "umbra"))
    ),
    ((AttributeType.ENTITY,), (AttributeType.BRAND,)),
    np.asarray([1, 2, 1, 2], np.int32),
    (4, 4),
    (1, 1),
)
LEAF_SCORES = (-0.5, -1.0, -2.0, -3.0, -4.0, -0.25)
FIRST_SLOT, SECOND_SLOT = (0, 3), (1, 3)


@dataclass
class ByTable:
    """Every leaf has its score; the best open ones are found."""

    scores: tuple[float, ...] = LEAF_SCORES
    rows: list[int] = field(default_factory=list)
    queries: list[list[int]] = field(default_factory=list)

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        allowed = inputs["allowed_1"][inputs["mask_row"]]
        self.rows.append(len(allowed))
        self.queries = [row[row != 0].tolist() for row in inputs["query_tokens"]] if "query_tokens" in inputs else []
        scores = np.where(allowed, np.asarray(self.scores, np.float32), np.float32(-2e9))
        leaves = np.argsort(-scores, axis=1, kind="stable")[:, : len(inputs["beams"])]
        found = np.take_along_axis(scores, leaves, axis=1)
        return Leaves(leaves, found, np.repeat(found[..., None] / 2, 2, axis=-1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "shop"
    manifest = Manifest(
        genretrieval_version="0.1.0",
        n_items=len(TABLE),
        codebook_sizes=(4, 4),
        reserved_slots=(1, 1),
        opset=18,
        minimum_onnxruntime="1.20",
        graph_inputs=("beams", "mask_row", "allowed_0", "allowed_1"),
        max_history=3,
        max_query_tokens=4,
        reads_queries=False,
        beam_width=6,
        exclude_seen=False,
    )
    with write_bundle(path, manifest) as partial:
        CODEBOOK.save(partial / KEYWORDS)
        TABLE.write_parquet(partial / CATALOGUE)
        (partial / GRAPH).write_bytes(b"")
    return path


@pytest.fixture
def retriever(folder: Path) -> Retriever:
    return Retriever(load_bundle(folder), ByTable())


def bound(*rows: int, slot: tuple[int, int] = FIRST_SLOT, name: str = "keywords/new") -> BoundKeyword:
    return BoundKeyword(name, "new", *slot, np.asarray(rows, np.int64))


def boost(amount: float, *rows: int, name: str = "rules/boost") -> Boost:
    return Boost(name, np.asarray(rows, np.int64), amount)


def ask(retriever: Retriever, edits: Edits | None = None, **fields: Any) -> RetrieveResponse:
    (response,) = retriever.retrieve([RetrieveRequest(query="new", **fields)], None if edits is None else [edits])
    return response


def order(retriever: Retriever, edits: Edits | None = None, **fields: Any) -> str:
    return "".join(item.item_id for item in ask(retriever, edits, **fields).items)


def test_a_keyword_leaf_is_closed_without_its_keyword(retriever) -> None:
    assert order(retriever) == "abcde"


def test_what_a_keyword_stands_for_comes_first_in_its_own_order(retriever) -> None:
    assert order(retriever, Edits(bound=(bound(C, E),))) == "ceabd"


def test_routed_items_stand_where_the_search_wrote_the_slot(folder) -> None:
    for slot_score, expected in ((-0.25, "ceabd"), (-1.5, "aceb" + "d"), (-2.5, "abce" + "d")):
        retriever = Retriever(load_bundle(folder), ByTable((*LEAF_SCORES[:5], slot_score)))
        response = ask(retriever, Edits(bound=(bound(C, E),)), bindings="routed")
        assert "".join(item.item_id for item in response.items) == expected
        # Their scores are those of their own semantic IDs.
        assert {item.item_id: item.score for item in response.items}["c"] == -3.0


def test_an_item_that_stands_before_the_slot_by_itself_stays_there(folder) -> None:
    retriever = Retriever(load_bundle(folder), ByTable((*LEAF_SCORES[:5], -2.5)))
    assert order(retriever, Edits(bound=(bound(A, D),)), bindings="routed") == "abdce"


def test_a_slot_that_the_search_did_not_write_routes_nothing(folder) -> None:
    retriever = Retriever(load_bundle(folder), ByTable((-99.0, *LEAF_SCORES[1:5], -99.0)))
    edits = Edits(bound=(bound(C, E),))
    assert order(retriever, edits, bindings="routed", beam_width=3, top_k=3) == "abc"
    assert order(retriever, edits, beam_width=3, top_k=3) == "cea"


def test_off_is_as_if_nothing_were_bound(retriever) -> None:
    edits = Edits(bound=(bound(C, E),))
    plain, off = ask(retriever), ask(retriever, edits, bindings="off")
    assert off.items == plain.items


def test_two_keywords_of_one_query_both_come_first(retriever) -> None:
    edits = Edits(bound=(bound(D), bound(B, slot=SECOND_SLOT, name="keywords/other")))
    response = ask(retriever, edits)
    assert [item.item_id for item in response.items] == ["b", "d", "a", "c", "e"]
    assert [item.touched_by for item in response.items] == [["keywords/other"], ["keywords/new"], [], [], []]
    assert response.items[0].level_scores == [-1.0, -1.0]


def test_the_slot_stands_in_front_of_the_query_and_the_search_among_its_items_reads_what_is_left(folder) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "new": 2, "shoe": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    backend = ByTable()
    retriever = Retriever(load_bundle(folder), backend)
    retriever.features = RequestFeatures(query_tokenizer=tokenizer.to_str(), keywords=CODEBOOK)
    names = (*retriever.bundle.manifest.graph_inputs, "query_tokens")
    retriever.bundle = replace(
        retriever.bundle, manifest=retriever.bundle.manifest.model_copy(update={"graph_inputs": names})
    )
    retriever.retrieve([RetrieveRequest(query="new shoe")], [Edits(bound=(bound(C, slot=SECOND_SLOT),))])
    # Slots are numbered behind the four tokens: level 1 begins at 8, and code 3 of it is reserved; "shoe" has slot 1.
    assert backend.queries == [[4 + 4 + 3, 4 + 1, 2, 3], [4 + 1, 3]]
    retriever.retrieve([RetrieveRequest(query="new shoe")], [Edits(bound=(bound(C, slot=FIRST_SLOT),))])
    # The place of "shoe" is taken.
    assert backend.queries == [[4 + 3, 2, 3], [4 + 1, 3]]


@dataclass
class Twice:
    """Two searches that disagree: the second, among what is bound, has scores and a user vector of its own."""

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        found = ByTable().run(inputs)
        second = ByTable((-9.0, -2.5, -1.5, -9.0, -9.0, -9.0)).run(inputs)
        users = np.asarray([[1.0, 0.0], [0.0, 1.0]], np.float32)[: len(found.leaves)]
        if len(found.leaves) == 1:
            return found._replace(user=users)
        parts = zip(found[:3], second[:3], strict=True)
        return Leaves(*(np.stack([one[0], other[1]]) for one, other in parts), users)


def test_bound_items_are_scored_by_the_search_among_them(folder, tmp_path) -> None:
    bundle = load_bundle(folder)
    vectors = np.zeros((len(TABLE), 2, 2), np.float32)
    vectors[:, 1] = [[1, 20], [2, 10], [3, 0], [4, 0], [5, 0]]
    with write_bundle(tmp_path / "dense", bundle.manifest.model_copy(update={"dense_weight": 0.1})) as partial:
        CODEBOOK.save(partial / KEYWORDS)
        TABLE.write_parquet(partial / CATALOGUE)
        np.save(partial / ITEM_VECTORS, vectors)
        (partial / GRAPH).write_bytes(b"")
    retriever = Retriever(load_bundle(tmp_path / "dense"), Twice())
    scores = {item.item_id: item.score for item in ask(retriever, Edits(bound=(bound(A, B),))).items}
    # A: -2.5 and 0.1 x 20 by the second search; C: -3 and 0.1 x 3 by the first.
    assert scores == pytest.approx({"a": -0.5, "b": -0.5, "c": -2.7, "d": -3.6, "e": -3.5})


def test_an_empty_binding_changes_no_order(retriever) -> None:
    assert order(retriever, Edits(bound=(bound(),))) == "abcde"


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (Edits(boosts=(boost(2.5, D),)), "adbce"),
        (Edits(boosts=(boost(-1.5, A),)), "bacde"),
        (Edits(boosts=(boost(1.25, D), boost(1.25, D, E))), "adbec"),
        (Edits(blocked=np.asarray([A, C])), "bde"),
        (Edits(pins=(Pin("rules/p", E, 0),)), "eabcd"),
        (Edits(pins=(Pin("rules/p", A, 2), Pin("rules/q", E, 0))), "ebacd"),
        (Edits(pins=(Pin("rules/p", A, 400),)), "bcdea"),
        (Edits(pins=(Pin("rules/p", C, 1), Pin("rules/q", D, 1))), "acdbe"),
        # A block holds against a pin, a pin against a binding, a binding against a boost.
        (Edits(pins=(Pin("rules/p", E, 0),), blocked=np.asarray([E])), "abcd"),
        (Edits(pins=(Pin("rules/p", A, 0),), bound=(bound(D),)), "adbce"),
        (Edits(boosts=(boost(99.0, E),), bound=(bound(C, D),)), "cdeab"),
        (Edits(boosts=(boost(9.0, D),), bound=(bound(C, D),)), "dcabe"),
    ],
)
def test_each_edit_and_which_goes_before_which(retriever, edits, expected) -> None:
    assert order(retriever, edits) == expected


def test_blocked_items_use_up_no_beam(retriever) -> None:
    edits = Edits(blocked=np.asarray([A, B]), bound=(bound(A, C),))
    assert order(retriever, edits, beam_width=2, top_k=2) == "cd"


def test_a_binding_without_items_costs_no_beam_and_touches_nothing(retriever) -> None:
    edits = Edits(bound=(bound(),))
    assert order(retriever, edits, beam_width=5, top_k=5) == "abcde"
    routed = Edits(bound=(bound(C),))
    assert [i.touched_by for i in ask(retriever, routed, bindings="off").items] == [[]] * 5


def test_a_boost_is_part_of_the_score_and_names_what_it_touched(retriever) -> None:
    response = ask(retriever, Edits(boosts=(boost(2.5, D),), applied=("rules/boost",), revision=7))
    moved = response.items[1]
    assert (moved.item_id, moved.score, moved.touched_by) == ("d", -1.5, ["rules/boost"])
    assert (response.applied, response.revision) == (["rules/boost"], 7)


def test_the_keyword_path_of_an_item_is_told(retriever) -> None:
    paths = {item.item_id: item.keyword_path for item in ask(retriever).items}
    assert paths["b"] == ["shoe", "umbra"]
    assert paths["c"] == ["hat", "acme"]


def test_filters_and_exclusions_hold_against_every_edit(retriever) -> None:
    edits = Edits(bound=(bound(C, E),), pins=(Pin("rules/p", E, 0),))
    assert order(retriever, edits, filters=Filters(max_price=35)) == "cab"
    assert order(retriever, edits, exclude_item_ids=["c"]) == "eabd"


def test_others_of_the_batch_are_untouched_and_batches_stay_within_the_mask_rows(folder) -> None:
    backend = ByTable()
    retriever = Retriever(load_bundle(folder), backend)
    plain = ask(retriever).items
    requests = [RetrieveRequest(query="new")] * 40
    edits = [Edits(bound=(bound(D),)) if i % 2 else Edits() for i in range(40)]
    backend.rows.clear()
    responses = retriever.retrieve(requests, edits)
    assert all(response.items == plain for response in responses[::2])
    assert all(response.items[0].item_id == "d" for response in responses[1::2])
    assert sum(backend.rows) == 60
    assert max(backend.rows) <= 32


def test_a_bundle_without_slots_still_lists_what_is_bound_first(folder, tmp_path) -> None:
    bundle = load_bundle(folder)
    manifest = bundle.manifest.model_copy(update={"reserved_slots": ()})
    with write_bundle(tmp_path / "plain", manifest) as partial:
        TABLE.write_parquet(partial / CATALOGUE)
        (partial / GRAPH).write_bytes(b"")
    retriever = Retriever(load_bundle(tmp_path / "plain"), ByTable(LEAF_SCORES[1:5]))
    assert order(retriever, Edits(bound=(bound(C, E),))) == "ceabd"


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.nan])), st.integers(1, 9))
def test_the_best_are_the_first_of_all_in_order(scores, at_most) -> None:
    """Equal ones as they stand, also where not all of them are among the best; what is no number comes last."""
    best = in_order(np.asarray(scores, np.float32), at_most)
    falling = [np.inf if np.isnan(score) else -score for score in scores]
    assert best == sorted(range(len(scores)), key=falling.__getitem__)[:at_most]


@given(st.permutations(range(6)), st.lists(st.tuples(st.integers(0, 6), st.sets(st.integers(0, 5))), max_size=3))
def test_blocks_move_up_and_nothing_else_changes_its_order(order_, given_blocks) -> None:
    blocks = [(place, np.isin(np.arange(6), list(members))) for place, members in given_blocks]
    found = with_blocks(order_, blocks)
    assert sorted(found) == list(range(6))
    members = set().union(*(members for _, members in given_blocks))
    assert [i for i in found if i not in members] == [i for i in order_ if i not in members]
    if len(blocks) == 1:
        place = blocks[0][0]
        late = [i for i in order_[place:] if i in members]
        assert found[place : place + len(late)] == late
        assert all(found.index(i) <= order_.index(i) for i in members)


@given(st.permutations(range(6)), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=4), st.data())
def test_pins_stand_at_their_places_and_the_rest_keeps_its_order(order_, placed, data) -> None:
    rows = np.asarray(data.draw(st.permutations(range(10, 16))))
    pins = [Pin("p", int(rows[i]), place) for i, place in placed]
    found = with_pins(order_, rows, pins, 6)
    assert sorted(found) == list(range(6))
    pinned = {pin.row for pin in pins}
    assert [i for i in found if rows[i] not in pinned] == [i for i in order_ if rows[i] not in pinned]
    if len(pins) == 1 and pins[0].position < 6:
        assert rows[found[pins[0].position]] == pins[0].row


@given(
    st.permutations(range(6)),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=3),
    st.lists(st.integers(-1, 2), min_size=6, max_size=6),
    st.integers(1, 3),
    st.integers(1, 7),
)
def test_collapsing_counts_pins_first_then_the_best(order_, placed, values, cap, top_k) -> None:
    rows = np.arange(10, 16)
    pins = [Pin("p", int(rows[i]), place) for i, place in placed]
    shown = sorted((pin for pin in pins if pin.position < top_k), key=lambda pin: pin.position)
    late = sorted((pin for pin in pins if pin.position >= top_k), key=lambda pin: pin.position)
    first, last = ([pin.row - 10 for pin in some] for some in (shown, late))
    counted: dict[int, int] = {}
    kept = set()
    for position in dict.fromkeys([*first, *(i for i in order_ if i not in first + last), *last]):
        value = values[position]
        counted[value] = counted.get(value, 0) + 1
        if value < 0 or counted[value] <= cap:
            kept.add(position)
    left, left_pins = collapsed(order_, rows, pins, np.asarray(values), cap=cap, top_k=top_k)
    assert left == [i for i in order_ if i in kept]
    assert left_pins == [pin for pin in pins if pin.row - 10 in kept]


def test_a_result_collapses_around_its_pins(folder, tmp_path) -> None:
    """a, b and c of one brand; d of another; e of none."""
    bundle = load_bundle(folder)
    table = TABLE.with_columns(brand=pl.Series(["x", "x", "x", "y", None]))
    with write_bundle(tmp_path / "brands", bundle.manifest.model_copy(update={"reserved_slots": ()})) as partial:
        table.write_parquet(partial / CATALOGUE)
        (partial / GRAPH).write_bytes(b"")
    retriever = Retriever(load_bundle(tmp_path / "brands"), ByTable(LEAF_SCORES[1:5]))
    assert order(retriever, collapse_by="brand") == "ade"
    assert order(retriever, collapse_by="brand", collapse_cap=2) == "abde"
    pinned = Edits(pins=(Pin("rules/p", C, 1),))
    assert order(retriever, pinned, collapse_by="brand") == "dce"
    both = Edits(pins=(Pin("rules/p", C, 1), Pin("rules/q", B, 0)))
    assert order(retriever, both, collapse_by="brand") == "bde"
    assert order(retriever, Edits(bound=(bound(B, E),)), collapse_by="brand") == "bed"


def test_a_search_that_collapsing_left_short_goes_on_wider(folder, tmp_path) -> None:
    """Two beams find a and b, which are of one brand; four times as many find d. A third brand there is not."""
    table = TABLE.with_columns(brand=pl.Series(["x", "x", "x", "y", "y"]))
    with write_bundle(tmp_path / "two", load_bundle(folder).manifest) as partial:
        CODEBOOK.save(partial / KEYWORDS)
        table.write_parquet(partial / CATALOGUE)
        (partial / GRAPH).write_bytes(b"")
    retriever = Retriever(load_bundle(tmp_path / "two"), ByTable())
    runs = retriever.backend.rows
    assert order(retriever, top_k=2, beam_width=2) == "ab"
    assert len(runs) == 1
    assert order(retriever, top_k=2, beam_width=2, collapse_by="brand") == "ad"
    assert len(runs) == 3
    short = ask(retriever, top_k=3, beam_width=3, collapse_by="brand")
    assert ([item.item_id for item in short.items], short.degraded[0]) == (["a", "d"], "fewer_than_top_k")
    # The second search was not cut off.
    assert len(runs) == 5


@given(st.lists(st.integers(1, 2), max_size=30))
def test_batches_keep_the_order_and_the_limit(sizes) -> None:
    rows = list(range(len(sizes)))
    found = list(batches(rows, sizes, 4))
    assert [row for batch in found for row in batch] == rows
    assert all(sum(sizes[row] for row in batch) <= 4 for batch in found)
