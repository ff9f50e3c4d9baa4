from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from genretrieval import item_vectors, retrieval
from genretrieval.bundle import CATALOGUE, GRAPH, ITEM_VECTORS, Manifest, load_bundle, write_bundle
from genretrieval.errors import BundleError, RequestError
from genretrieval.masks import Mask, MaskRows
from genretrieval.request import Filters, RetrieveRequest
from genretrieval.retrieval import Leaves, Retriever
from genretrieval.servable import Catalogue

# Leaves in sorted order: (0,0): b a (by popularity), (0,1): c, (1,0): d, (1,2): e.
TABLE = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d", "e"],
        "semantic_id": pl.Series([[0, 0], [0, 0], [0, 1], [1, 0], [1, 2]], dtype=pl.List(pl.Int32)),
        "popularity": [1, 9, 5, 5, 0],
        "brand": ["acme", "umbra", "acme", None, "umbra"],
        "categories": [["shoes", "red"], ["shoes"], [], None, ["hats"]],
        "price": [10.0, 20.0, 30.0, None, 50.0],
        "in_stock": [True, True, False, True, None],
        "size": [1, 2, 3, 4, 5],
    }
)
INPUTS = (
    "history_codes", "history_events", "history_gaps", "history_mask", "query_tokens", "query_mask", "profile",
    "beams", "mask_row", "token_0", "child_start_0", "slot_0", "allowed_0", "token_1", "child_start_1", "slot_1",
    "allowed_1",
)  # fmt: skip


class ByNumber:
    """Leaf k scores -k for everyone; keeps what it was given, and notices a mask that changes under it."""

    def __init__(self) -> None:
        self.inputs: dict[str, NDArray[Any]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        self.inputs = inputs
        self.entered.release()
        before = inputs["allowed_1"][inputs["mask_row"]]
        assert self.gate.wait(20)
        allowed = inputs["allowed_1"][inputs["mask_row"]]
        assert (before == allowed).all()
        n_beams = len(inputs["beams"])
        leaves = np.tile(np.arange(n_beams) % 4, (len(allowed), 1))
        beams_open = np.take_along_axis(allowed, leaves, axis=1) & (np.arange(n_beams) < 4)
        scores = np.where(beams_open, -leaves, -2e9).astype(np.float32)
        return Leaves(leaves, scores, np.repeat(scores[..., None] / 2, 2, axis=-1))


def write(
    path: Path,
    table: pl.DataFrame = TABLE,
    leaf_cap: int | None = None,
    vectors: NDArray[np.float32] | None = None,
    **changes: Any,
) -> Path:
    manifest = Manifest(
        created=datetime(2026, 1, 2, tzinfo=UTC),
        genretrieval_version="0.1.0",
        n_items=len(table),
        codebook_sizes=(2, 3),
        leaf_cap=leaf_cap,
        opset=18,
        minimum_onnxruntime="1.20",
        graph_inputs=changes.pop("graph_inputs", INPUTS),
        events=("click", "purchase"),
        max_history=3,
        max_query_tokens=4,
        reads_queries=False,
        beam_width=4,
        exclude_seen=False,
        profile_features=("country",),
        n_profile_buckets=16,
        **changes,
    )
    with write_bundle(path, manifest) as folder:
        table.write_parquet(folder / CATALOGUE)
        (folder / GRAPH).write_bytes(b"")
        if vectors is not None:
            np.save(folder / ITEM_VECTORS, vectors)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundles") / "shop")


@pytest.fixture
def backend() -> ByNumber:
    return ByNumber()


@pytest.fixture
def retriever(folder: Path, backend: ByNumber) -> Retriever:
    return Retriever(load_bundle(folder), backend)


@pytest.fixture(scope="module")
def catalogue(folder: Path) -> Catalogue:
    return Catalogue.open(load_bundle(folder))


def request(history: str = "", **fields: Any) -> RetrieveRequest:
    return RetrieveRequest(history=[{"item_id": item} for item in history], **fields)


def items(retriever: Retriever, *args: Any, **fields: Any) -> str:
    (response,) = retriever.retrieve([request(*args, **fields)])
    return "".join(item.item_id for item in response.items)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "abcde"),
        ({"attributes": {"brand": ["acme"]}}, "ac"),
        ({"attributes": {"brand": ["acme", "umbra"]}}, "abce"),
        ({"attributes": {"brand": []}}, ""),
        ({"attributes": {"category": ["shoes"]}}, "ab"),
        ({"attributes": {"categories": ["red", "hats"]}}, "ae"),
        ({"attributes": {"brand": ["acme"], "category": ["shoes"]}}, "a"),
        ({"attributes": {"size": ["2", "4"]}}, "bd"),
        ({"attributes": {"in_stock": ["true"]}}, "abd"),
        ({"min_price": 20}, "bce"),
        ({"max_price": 20}, "ab"),
        ({"min_price": 15, "max_price": 30}, "bc"),
        ({"in_stock": True}, "abd"),
        ({"in_stock": False}, "c"),
    ],
)
def test_filters_by_hand(catalogue, filters, expected) -> None:
    matching = catalogue.matching(Filters.model_validate(filters))
    assert matching.dtype == bool
    assert "".join(np.asarray(list("abcde"))[matching]) == expected


@pytest.mark.parametrize("name", ["colour", "item_id", "semantic_id", "popularity"])
def test_what_is_no_attribute_cannot_be_filtered_on(retriever, name) -> None:
    asked = request(filters={"attributes": {name: ["x"]}})
    message = f"unknown attribute '{name}'; the catalogue has brand, categories, in_stock, price, size"
    with pytest.raises(RequestError, match=message):
        retriever.check(asked)
    with pytest.raises(RequestError, match=message):
        retriever.retrieve([request(), asked])
    assert items(retriever) == "bacde"


def test_columns_that_are_absent_or_of_another_type_are_refused(tmp_path) -> None:
    table = TABLE.drop("price").with_columns(in_stock=pl.lit("yes"))
    retriever = Retriever(load_bundle(write(tmp_path / "shop", table)), ByNumber())
    for filters, column in (({"min_price": 1.0}, "'price'"), ({"in_stock": True}, "'in_stock'")):
        with pytest.raises(RequestError, match=column):
            retriever.check(request(filters=filters))


def test_items_of_a_leaf_come_by_popularity_and_leaves_by_score(retriever) -> None:
    (response,) = retriever.retrieve([request()])
    assert "".join(item.item_id for item in response.items) == "bacde"
    assert [item.score for item in response.items] == [0, 0, -1, -2, -3]
    assert response.items[4].semantic_id == [1, 2]
    assert response.items[4].level_scores == [-1.5, -1.5]


def test_top_k_may_cut_a_leaf(retriever) -> None:
    assert items(retriever, top_k=1) == "b"
    assert items(retriever, top_k=3) == "bac"


def test_equal_scores_are_ordered_by_leaf(retriever, backend, monkeypatch) -> None:
    found = Leaves(np.asarray([[2, 0, 3, 1]]), np.zeros((1, 4), np.float32), np.zeros((1, 4, 2), np.float32))
    monkeypatch.setattr(backend, "run", lambda inputs: found)
    assert items(retriever) == "bacde"


def test_a_capped_leaf_lists_its_most_popular_items_that_may_be_shown(tmp_path, backend) -> None:
    capped = Retriever(load_bundle(write(tmp_path / "capped", leaf_cap=1)), backend)
    assert items(capped) == "bcde"
    assert items(capped, exclude_item_ids=["b"]) == "acde"


# Items a to e; the user of `ByVector` is (1, 0), so the first number of the second vector is the dense score.
RANKED = np.asarray([[0.5, 9], [0, 9], [2, 9], [-1, 9], [3, 9]], np.float32)
READ = -RANKED
VECTORS = np.stack([READ, RANKED], 1)


class ByVector(ByNumber):
    """The same with a dense head."""

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        found = super().run(inputs)
        return found._replace(user=np.tile(np.float32([1, 0]), (len(found.leaves), 1)))


@pytest.fixture
def dense(tmp_path: Path) -> Retriever:
    inputs = (*INPUTS[:4], "history_vectors", *INPUTS[4:])
    folder = write(tmp_path / "dense", vectors=VECTORS, dense_weight=1.0, graph_inputs=inputs)
    return Retriever(load_bundle(folder), ByVector())


def test_a_dense_head_ranks_anew_what_was_found(dense) -> None:
    """Leaf scores 0 (b, a), -1 (c), -2 (d), -3 (e), plus the dense scores above."""
    (response,) = dense.retrieve([RetrieveRequest()])
    assert [(item.item_id, item.score) for item in response.items] == [
        ("c", 1.0), ("a", 0.5), ("b", 0.0), ("e", 0.0), ("d", -3.0),
    ]  # fmt: skip
    assert [item.dense_score for item in response.items] == [2.0, 0.5, 0.0, 3.0, -1.0]
    assert response.items[0].level_scores == [-0.5, -0.5]
    assert items(dense, filters={"in_stock": True}, exclude_item_ids=["a"]) == "bd"


def test_the_dense_head_reads_the_vectors_of_the_history(dense) -> None:
    items(dense, "ce")
    given = dense.backend.inputs["history_vectors"]
    assert given.dtype == np.float32
    assert given[0].tolist() == READ[[2, 4]].tolist()


@pytest.mark.parametrize("kept", [0, 12, 1 << 22])
def test_products_are_those_of_every_search_and_item(kept, monkeypatch) -> None:
    """Whether few items are asked for, or all are multiplied, for one search or for several together."""
    monkeypatch.setattr(item_vectors, "_KEPT", kept)
    rng = np.random.default_rng(0)
    of_bundle, of_later, users = (rng.normal(size=(n, 3)).astype(np.float32) for n in (4, 2, 3))
    products = item_vectors.Products(item_vectors.ItemVectors(of_bundle, of_later), users)
    for search in (0, 2, 1, 2):
        for rows in (np.asarray([5]), np.asarray([0, 5, 3, 1]), np.arange(6), np.arange(0)):
            expected = np.concatenate([of_bundle, of_later])[rows] @ users[search]
            np.testing.assert_allclose(products.of(search, rows), expected, rtol=1e-5, atol=1e-6)


def test_items_that_training_never_saw_join_where_the_search_was_cut_off(dense) -> None:
    """Item e is the only one without a training interaction."""
    (response,) = dense.retrieve([RetrieveRequest(beam_width=2, top_k=2)])
    assert [item.item_id for item in response.items] == ["e", "c"]
    # As probable as the last that was found, -1, and its dense score.
    assert response.items[0].score == 2.0
    assert response.items[0].level_scores == []
    assert response.items[0].semantic_id == [1, 2]
    assert items(dense, beam_width=2, top_k=2, exclude_item_ids=["e"]) == "ca"
    assert items(dense, beam_width=2, top_k=2, filters={"attributes": {"brand": ["acme"]}}) == "ca"


def test_a_small_catalogue_is_compared_whole_where_the_search_was_cut_off(dense, tmp_path, monkeypatch) -> None:
    """One beam finds b and a; of the others c is nearest to the user but for e, which no one has met yet."""
    assert items(dense, beam_width=1, top_k=1, exclude_item_ids=["e"]) == "c"
    assert items(dense, beam_width=1, top_k=1, exclude_item_ids=["e", "c"]) == "a"
    assert items(dense, beam_width=1, top_k=1, filters={"in_stock": True}, exclude_item_ids=["a"]) == "b"
    monkeypatch.setattr(retrieval, "COMPARED_ITEMS", 4)
    large = Retriever(dense.bundle, ByVector())
    assert items(large, beam_width=1, top_k=1, exclude_item_ids=["e"]) == "a"
    assert items(large, beam_width=1, top_k=1) == "e"


def test_the_past_is_what_came_before_the_history_and_exposures_are_no_history(tmp_path) -> None:
    """A history of three interactions at most, then three events before them."""
    past = ("past_codes", "past_events", "past_mask", "past_vectors", "history_vectors", "scenario")
    folder = write(
        tmp_path / "past", vectors=VECTORS, graph_inputs=(*INPUTS, *past), max_past=3, scenarios=("home", "search")
    )
    retriever = Retriever(load_bundle(folder), ByVector())
    events = [("a", "exposure"), ("b", "click"), ("gone", "click"), ("c", "exposure"), ("d", "purchase"),
              ("a", "click"), ("e", "exposure"), ("b", "click"), ("c", "buy")]  # fmt: skip
    history = [{"item_id": item, "event": event} for item, event in events]
    (response,) = retriever.retrieve([RetrieveRequest(history=history, scenario="search")])
    given = retriever.backend.inputs
    # Unknown events are 0, click 1, purchase 2, exposure 3.
    assert given["history_events"].tolist() == [[1, 1, 0]]
    assert given["history_vectors"][0].tolist() == READ[[0, 1, 2]].tolist()
    assert given["past_events"].tolist() == [[1, 3, 2]]
    assert given["past_mask"].tolist() == [[True, True, True]]
    assert given["past_vectors"][0].tolist() == READ[[1, 2, 3]].tolist()
    assert given["past_codes"].tolist() == [[[0, 0], [0, 1], [1, 0]]]
    assert given["scenario"].tolist() == [2]
    assert response.missing_ids == ["gone"]
    assert "history_truncated" not in response.degraded
    longer = [{"item_id": "a", "event": "click"}] * 7
    (response,) = retriever.retrieve([RetrieveRequest(history=longer, scenario="elsewhere")])
    assert "history_truncated" in response.degraded
    assert retriever.backend.inputs["scenario"].tolist() == [0]


@pytest.mark.parametrize("vectors", [VECTORS[:4], VECTORS.astype(np.float64), RANKED])
def test_item_vectors_that_are_not_the_catalogue_s_are_refused(tmp_path, vectors) -> None:
    bundle = load_bundle(write(tmp_path / "odd", vectors=vectors))
    with pytest.raises(BundleError, match=r"not float32 \[5, 2, D\]"):
        Retriever(bundle, ByVector())


def test_a_filter_hides_the_rest_of_a_leaf(retriever) -> None:
    assert items(retriever, filters={"attributes": {"brand": ["acme"]}}) == "ac"
    assert items(retriever, filters={"attributes": {"brand": ["umbra"]}}) == "be"
    assert items(retriever, filters={"attributes": {"brand": ["nobody"]}}) == ""


def test_exclusions(retriever) -> None:
    assert items(retriever, exclude_item_ids=["b", "d", "nothing"]) == "ace"
    history = [{"item_id": "a", "event": "purchase"}, {"item_id": "c", "event": "click"}]
    for which, expected in {"off": "bacde", "purchased": "bcde", "all": "bde"}.items():
        (response,) = retriever.retrieve([RetrieveRequest(history=history, exclude_history=which)])
        assert "".join(item.item_id for item in response.items) == expected


def test_a_response_names_what_it_lacks(retriever) -> None:
    (response,) = retriever.retrieve([request("axbx", exclude_item_ids=["y", "x"], query="red")])
    assert response.missing_ids == ["x", "y"]
    assert response.degraded == ["fewer_than_top_k", "query_ignored"]
    (full,) = retriever.retrieve([request("abcd", top_k=2)])
    assert full.degraded == ["history_truncated"]
    # Unknown items take no place of the three that the model reads.
    (known,) = retriever.retrieve([request("xyzabc", top_k=2)])
    assert known.degraded == []


def test_the_graph_is_given_what_the_manifest_names(retriever, backend) -> None:
    history = [
        {"item_id": "a", "timestamp": 100},
        {"item_id": "?"},
        {"item_id": "c", "event": "purchase", "timestamp": 100},
        {"item_id": "d", "event": "looked", "timestamp": 150},
        {"item_id": "e", "event": "click", "timestamp": 90_000},
    ]
    retriever.retrieve([RetrieveRequest(history=history), request("b")])
    inputs = backend.inputs
    assert tuple(inputs) == INPUTS
    # The last three known events, oldest first; shorter histories are padded at the end.
    assert inputs["history_codes"].tolist() == [[[0, 1], [1, 0], [1, 2]], [[0, 0], [0, 0], [0, 0]]]
    assert inputs["history_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert inputs["history_events"].tolist() == [[2, 0, 1], [0, 0, 0]]
    assert inputs["history_gaps"][0, 0] == 0
    assert (inputs["history_gaps"][0, 1:] > 0).all()
    assert inputs["beams"].tolist() == list(range(10))  # never below top_k
    assert inputs["query_mask"].shape == (2, 2)
    assert not inputs["query_mask"].any()
    assert inputs["profile"].shape == (2, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            request,
            st.text("abcde?", max_size=5),
            top_k=st.integers(1, 8),
            beam_width=st.none() | st.integers(1, 6),
            filters=st.none() | st.builds(Filters, min_price=st.integers(0, 60)),
        ),
        max_size=6,
    )
)
def test_each_answer_is_the_one_the_request_would_get_alone(folder, requests) -> None:
    retriever = Retriever(load_bundle(folder), ByNumber())
    together = retriever.retrieve(requests)
    alone = [retriever.retrieve([one])[0] for one in requests]
    assert [r.model_dump(exclude={"timings"}) for r in together] == [r.model_dump(exclude={"timings"}) for r in alone]


def test_a_batch_of_more_filters_than_rows_is_answered(retriever) -> None:
    requests = [request(filters={"min_price": price}) for price in range(70)]
    answers = retriever.retrieve(requests)
    assert ["".join(item.item_id for item in answer.items) for answer in answers[9:12]] == [
        "bace",
        "bace",
        "bce",
    ]


def by_price(low: float) -> Mask:
    return Mask(Filters(min_price=low))


def let_through(masks: MaskRows, row: int) -> str:
    return "".join(np.asarray(list("abcde"))[masks.lets(row, np.arange(5), np.empty(0, np.int64))])


def test_a_mask_row_closes_what_a_filter_excludes(catalogue) -> None:
    masks = MaskRows(catalogue, n_rows=3)
    with masks.hold([Mask(), by_price(40), by_price(40)]) as rows:
        assert rows[0] == 0
        assert rows[1] == rows[2] > 0
        assert masks.arrays["allowed_0"][rows[1]].tolist() == [False, True]
        assert masks.arrays["allowed_1"][rows[1]].tolist() == [False, False, False, True]
        assert let_through(masks, rows[1]) == "e"
        assert masks.arrays["allowed_1"][0].all()


def test_a_row_is_kept_for_its_filter_and_the_least_recently_used_goes(catalogue) -> None:
    masks = MaskRows(catalogue, n_rows=3)
    used = {}
    for low in (10, 20):
        with masks.hold([by_price(low)]) as (used[low],):
            pass
    with masks.hold([by_price(10)]) as (again,):
        assert again == used[10]
    with masks.hold([by_price(30)]) as (third,):
        assert third == used[20]
        assert let_through(masks, third) == "ce"


def test_a_row_that_is_held_is_not_reused_and_the_next_waits(catalogue) -> None:
    masks = MaskRows(catalogue, n_rows=2)
    got = threading.Event()

    def other() -> str:
        with masks.hold([by_price(50)]) as (row,):
            got.set()
            return let_through(masks, row)

    with ThreadPoolExecutor(1) as pool:
        with masks.hold([by_price(10)]) as (row,):
            waiting = pool.submit(other)
            assert not got.wait(0.05)
            assert let_through(masks, row) == "abce"
        assert waiting.result(10) == "e"


def test_a_refused_filter_lets_go_of_the_rows_before_it(catalogue) -> None:
    masks = MaskRows(catalogue, n_rows=2)
    bad = Mask(Filters(attributes={"colour": ["red"]}))
    with pytest.raises(RequestError), masks.hold([by_price(10), bad]):
        pass
    with masks.hold([by_price(20)]) as (row,):
        assert row == 1


def test_batches_at_the_same_time_keep_their_masks(folder) -> None:
    backend = ByNumber()
    retriever = Retriever(load_bundle(folder), backend)
    retriever.masks = MaskRows(retriever.catalogue, n_rows=4)
    backend.gate.clear()
    expected = {10: "bace", 20: "bce", 30: "ce", 40: "e", 50: "e"}
    with ThreadPoolExecutor(5) as pool:
        futures = {low: pool.submit(items, retriever, filters={"min_price": low}) for low in expected}
        for _ in range(3):
            assert backend.entered.acquire(timeout=10)
        backend.gate.set()
        assert {low: future.result(10) for low, future in futures.items()} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 0},
        {"top_k": 501},
        {"beam_width": 0},
        {"history": [{"item_id": "a", "timestamp": 1_700_000_000_000}]},
        {"history": [{"item_id": "a", "timestamp": -1}]},
        {"filters": {"min_price": float("nan")}},
        {"topk": 5},
    ],
)
def test_malformed_requests_are_refused(fields) -> None:
    with pytest.raises(ValidationError):
        RetrieveRequest.model_validate(fields)
