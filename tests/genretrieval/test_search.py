"""Beam search against three oracles: exact scoring, a beam search over a dict trie, Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from genretrieval import __version__
from genretrieval.bundle import Manifest
from genretrieval.catalogue import CatalogueIndex, build_index, closed_inputs, graph_inputs, mask_inputs
from genretrieval.export.onnx import GraphBackend, named_graph
from genretrieval.features import RequestFeatures
from genretrieval.model import BeamSearch, Generator
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import CLOSED_BELOW, Leaves, Retriever
from genretrieval.semantic_ids import SemanticIds

Requests = dict[str, NDArray[Any]]
Ranking = list[tuple[int, float]]
SAME = 1e-5
NOTHING_ELSE = {
    "query_vocab_size": 0, "n_profile_buckets": 0, "n_items": 0, "n_scenarios": 0, "n_past_tokens": 0, "max_past": 0,
    "n_experts": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def generator(make_generator: Any) -> Generator:
    made: Generator = make_generator()
    return made


@pytest.fixture(scope="module")
def plain(make_generator: Any) -> Generator:
    """A model that reads histories alone."""
    made: Generator = make_generator(1, **NOTHING_ELSE)
    return made


def search(
    generator: Generator,
    requests: Requests,
    index: CatalogueIndex,
    width: int,
    allowed: NDArray[np.bool_] | None = None,
    entered: NDArray[np.bool_] | None = None,
) -> list[Ranking]:
    """Leaves and scores of every request, best first.

    `allowed` is a leaf mask for each request, `entered` leaves which it does not exclude.
    """
    n = len(requests["history_codes"])
    every = np.ones((n, index.n_leaves), bool)
    masks = [index.allowed_nodes(mask) for mask in (every if allowed is None else allowed)]
    excluded = [np.flatnonzero(~row) for row in (every if entered is None else entered)]
    closed = [index.closed_with(leaves, mask) for leaves, mask in zip(excluded, masks, strict=True)]
    inputs = {
        **requests,
        **graph_inputs(index),
        **mask_inputs(masks),
        **closed_inputs(closed),
        "beams": np.arange(width),
        "mask_row": np.arange(n),
    }
    found = GraphBackend(named_graph(generator)).run(inputs)
    assert found.leaves.shape == found.scores.shape == (n, width)
    assert found.scores.dtype == np.float32
    rankings = []
    for leaves, scores, parts in zip(*found[:3], strict=True):
        assert (np.diff(scores) <= 0).all()
        live = scores > CLOSED_BELOW
        np.testing.assert_allclose(parts[live].sum(-1), scores[live], atol=1e-5)
        rankings.append(list(zip(leaves[live].tolist(), scores[live].tolist(), strict=True)))
    return rankings


def one(requests: Requests, row: int) -> Requests:
    return {name: array[row : row + 1] for name, array in requests.items()}


def tensors(requests: Requests) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in requests.items()}


def assert_same(found: Ranking, expected: Ranking) -> None:
    """Equal scores; equal leaves wherever the gap to the next score is larger than rounding."""
    assert len(found) == len(expected)
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=0, atol=SAME)
    scores = [score for _, score in expected]
    cuts = [0, *(i for i in range(1, len(scores)) if scores[i - 1] - scores[i] > SAME)]
    # Of leaves tied at the beam's last place, any may have been left out.
    for start, end in pairwise(cuts):
        assert {leaf for leaf, _ in found[start:end]} == {leaf for leaf, _ in expected[start:end]}
    leaves = [leaf for leaf, _ in found]
    assert len(leaves) == len(set(leaves))


@torch.inference_mode()
def exact(generator: Generator, request: Requests, index: CatalogueIndex) -> Ranking:
    """Teacher-force every leaf; each softmax is over the codes that exist under the leaf's prefix."""
    codes = index.leaf_codes(np.arange(index.n_leaves))
    n = int(request["history_mask"].sum())
    rows = len(codes)
    batch = {name: t.expand(rows, *t.shape[1:]) for name, t in tensors(request).items()}
    batch |= {name: t[:, :n] for name, t in batch.items() if name.startswith("history_")}
    target = torch.zeros(rows, n + 1, index.n_levels, dtype=torch.long)
    target[:, -1] = torch.from_numpy(codes)
    batch["target_codes"] = target
    if "scenario" in batch:
        batch["target_scenarios"] = batch["scenario"][:, None].expand(-1, n + 1)
    batch["query_rows"] = torch.arange(rows) * (n + 1) + n
    decoded = generator.decode_targets(batch).states_BTLD[:, -1]
    score = np.zeros(rows)
    for level in range(index.n_levels):
        logits = generator.level_logits(decoded[:, level], level).double().numpy()
        for row, code in enumerate(codes):
            siblings = {c[level] for c in codes.tolist() if c[:level] == code[:level].tolist()}
            score[row] += logits[row, code[level]] - np.log(sum(np.exp(logits[row, c]) for c in siblings))
    return sorted(enumerate(score.tolist()), key=lambda pair: -pair[1])


def dict_beam_search(
    generator: Generator, request: Requests, index: CatalogueIndex, width: int, allowed: NDArray[np.bool_]
) -> Ranking:
    """The search in plain Python: one prefix at a time, children from the catalogue's code tuples."""
    codes = [tuple(row) for row in index.leaf_codes(np.arange(index.n_leaves)).tolist()]
    leaf_of = {code: leaf for leaf, code in enumerate(codes)}
    offsets = generator.config.level_offsets
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for level in range(index.n_levels):
        flat = torch.tensor([[0, *(offsets[i] + code for i, code in enumerate(prefix))] for prefix, _ in beams])
        if not len(flat):
            return []
        repeated = {name: t.expand(len(beams), *t.shape[1:]) for name, t in tensors(request).items()}
        with torch.inference_mode():
            logits = generator(**repeated, decoder_input_ids=flat).logits[:, -1].double().numpy()
        grown = []
        for (prefix, score), scores in zip(beams, logits, strict=True):
            children = {code[level] for code in codes if code[:level] == prefix}
            norm = np.log(sum(np.exp(scores[offsets[level] + child]) for child in children))
            for child in sorted(children):
                longer = (*prefix, child)
                if any(allowed[leaf_of[code]] for code in codes if code[: level + 1] == longer):
                    grown.append((longer, score + float(scores[offsets[level] + child] - norm)))
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return [(leaf_of[prefix], score) for prefix, score in beams]


def hugging_face(generator: Generator, requests: Requests, index: CatalogueIndex, width: int) -> list[Ranking]:
    """``generate`` held to the catalogue by ``prefix_allowed_tokens_fn``."""
    codes = index.leaf_codes(np.arange(index.n_leaves)).astype(np.int64)
    flat = (codes + np.array(generator.config.level_offsets)).tolist()
    children: dict[tuple[int, ...], list[int]] = {}
    for path in flat:
        for level in range(len(path)):
            children.setdefault(tuple(path[:level]), []).append(path[level])
    given_tensors = tensors(requests)
    out = generator.generate(
        given_tensors.pop("history_codes"),
        **given_tensors,
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        length_penalty=0.0,
        renormalize_logits=True,
        max_new_tokens=index.n_levels,
        prefix_allowed_tokens_fn=lambda _, written: children[tuple(written[1:].tolist())],
        return_dict_in_generate=True,
        output_scores=True,
    )
    leaf_of = {tuple(path): leaf for leaf, path in enumerate(flat)}
    leaves = [leaf_of[tuple(path)] for path in out.sequences[:, 1:].tolist()]
    pairs = list(zip(leaves, out.sequences_scores.tolist(), strict=True))
    return [pairs[start : start + width] for start in range(0, len(pairs), width)]


def test_a_beam_for_every_leaf_is_exact_scoring(generator: Generator, make_ids: Any, make_requests: Any) -> None:
    index = build_index(make_ids(40))
    requests = make_requests(generator.config, 4, seed=3)
    found = search(generator, requests, index, index.n_leaves + 5)
    for row, ranking in enumerate(found):
        assert_same(ranking, exact(generator, one(requests, row), index))
        # All of the catalogue's probability is there.
        assert np.exp([score for _, score in ranking]).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("codes", "n_decoded"),
    [
        ([[0, 0, 0], [1, 5, 2], [2, 3, 1]], [1, 1, 1]),  # nothing to decide, and a size of zero is none
        ([[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 5, 2], [2, 3, 1]], [1, 1, 1]),
        ([[0, 0, 0], [0, 1, 0], [1, 5, 1], [1, 5, 2], [2, 3, 1], [2, 3, 2]], [1, 3, 2]),
    ],
)
def test_the_decoder_runs_for_beams_with_several_leaves_ahead(
    generator: Generator,
    make_requests: Any,
    monkeypatch: pytest.MonkeyPatch,
    codes: list[list[int]],
    n_decoded: list[int],
) -> None:
    index = build_index(SemanticIds(np.asarray(codes, np.int32), generator.config.codebook_sizes))
    requests = make_requests(generator.config, 2, seed=3)
    decoded: list[int] = []
    attend = BeamSearch._attend_path

    def counted(self: BeamSearch, x_ND: torch.Tensor, layer: Any, path: Any, n_rows: int) -> torch.Tensor:
        if layer is self.layers[0]:
            decoded.append(len(x_ND) // n_rows)
        return attend(self, x_ND, layer, path, n_rows)

    monkeypatch.setattr(BeamSearch, "_attend_path", counted)
    found = search(generator, requests, index, 8)
    assert decoded == n_decoded
    for row, ranking in enumerate(found):
        assert_same(ranking, exact(generator, one(requests, row), index))


@settings(max_examples=20, deadline=None)
@given(
    n_items=st.integers(1, 40),
    seed=st.integers(0, 99),
    width=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_it_is_the_beam_search_over_a_dict_trie(
    generator: Generator, make_ids: Any, make_requests: Any, n_items: int, seed: int, width: int, share: float
) -> None:
    index = build_index(make_ids(n_items, seed))
    requests = make_requests(generator.config, 2, seed=seed)
    allowed = np.random.default_rng(seed).random((2, index.n_leaves)) < share
    for row, ranking in enumerate(search(generator, requests, index, width, allowed)):
        assert_same(ranking, dict_beam_search(generator, one(requests, row), index, width, allowed[row]))
        leaves = [leaf for leaf, _ in ranking]
        assert len(leaves) == len(set(leaves)) <= min(width, allowed[row].sum())
        assert allowed[row][leaves].all()
        if width >= allowed[row].sum():
            assert len(leaves) == allowed[row].sum()


@pytest.mark.parametrize("width", [2, 4, 11])
@pytest.mark.parametrize("model", ["generator", "plain"])
def test_hugging_face_generate_finds_the_same(
    request: pytest.FixtureRequest, model: str, width: int, make_ids: Any, make_requests: Any
) -> None:
    generator: Generator = request.getfixturevalue(model)
    index = build_index(make_ids(60, seed=5))
    requests = make_requests(generator.config, 3, seed=6)
    theirs = hugging_face(generator, requests, index, width)
    for ours, expected in zip(search(generator, requests, index, width), theirs, strict=True):
        assert_same(ours, expected)


@settings(max_examples=30, deadline=None)
@given(
    n_items=st.integers(1, 40),
    seed=st.integers(0, 99),
    width=st.integers(1, 12),
    allowed_share=st.sampled_from([0.2, 0.7, 1.0]),
    entered_share=st.sampled_from([0.0, 0.2, 0.7, 0.95]),
)
def test_what_a_request_excludes_is_as_if_its_mask_left_it_out(
    generator: Generator,
    make_ids: Any,
    make_requests: Any,
    n_items: int,
    seed: int,
    width: int,
    allowed_share: float,
    entered_share: float,
) -> None:
    """To the bit; and so no beam ends at a node under which nothing is left."""
    index = build_index(make_ids(n_items, seed))
    requests = make_requests(generator.config, 3, seed=seed)
    rng = np.random.default_rng(seed)
    allowed, entered = (rng.random((3, index.n_leaves)) < share for share in (allowed_share, entered_share))
    found = search(generator, requests, index, width, allowed, entered)
    assert found == search(generator, requests, index, width, allowed & entered)
    assert [len(ranking) for ranking in found] == np.minimum((allowed & entered).sum(1), width).tolist()


def test_a_batch_answers_like_its_requests_alone(generator: Generator, make_ids: Any, make_requests: Any) -> None:
    index = build_index(make_ids(60))
    requests = make_requests(generator.config, 5, length=6, seed=8)
    allowed = np.random.default_rng(0).random((5, index.n_leaves)) < 0.5
    together = search(generator, requests, index, 6, allowed)
    for row, ranking in enumerate(together):
        alone = search(generator, one(requests, row), index, 6, allowed[row : row + 1])
        assert_same(ranking, alone[0])


def test_padding_changes_nothing(generator: Generator, make_ids: Any, make_requests: Any) -> None:
    index = build_index(make_ids(60))
    requests = make_requests(generator.config, 4, seed=9)
    padded = {}
    for name, array in requests.items():
        # Of any content: the mask alone tells.
        more = np.full((4, 3, *array.shape[2:]), array.dtype.type(0 if array.dtype == bool else 1))
        padded[name] = array if name in ("profile", "scenario") else np.concatenate([array, more], 1)
    for found, expected in zip(search(generator, padded, index, 6), search(generator, requests, index, 6), strict=True):
        assert_same(found, expected)


def test_a_wider_beam_never_scores_worse_at_the_top(generator: Generator, make_ids: Any, make_requests: Any) -> None:
    index = build_index(make_ids(80, seed=2))
    requests = make_requests(generator.config, 6, seed=4)
    full = search(generator, requests, index, index.n_leaves)
    for narrow, wide in zip(search(generator, requests, index, 3), full, strict=True):
        assert narrow[0][1] <= wide[0][1] + SAME


@pytest.fixture
def make_retriever(make_ids: Any) -> Callable[..., Retriever]:
    """A retriever over the eight IDs of two codes a level, item i under leaf 7 - i."""

    def make(backend: Any, graph_inputs: tuple[str, ...]) -> Retriever:
        codes = [[leaf >> 2 & 1, leaf >> 1 & 1, leaf & 1] for leaf in range(7, -1, -1)]
        table = pl.DataFrame(
            {"item_id": [f"i{row}" for row in range(8)], "semantic_id": codes, "popularity": [0] * 8},
            schema_overrides={"semantic_id": pl.List(pl.Int32)},
        )
        manifest = Manifest(
            genretrieval_version=__version__,
            n_items=8,
            codebook_sizes=(5, 6, 4),
            opset=1,
            minimum_onnxruntime="1",
            graph_inputs=graph_inputs,
            events=(),
            profile_features=(),
            n_profile_buckets=0,
            max_history=8,
            max_query_tokens=4,
            reads_queries=False,
            beam_width=8,
            exclude_seen=False,
        )
        bundle = SimpleNamespace(
            manifest=manifest, features=RequestFeatures, catalogue=lambda: table, item_vectors=lambda: None
        )
        return Retriever(bundle, backend)

    return make


def test_ties_are_listed_by_leaf(make_generator: Any, make_retriever: Callable[..., Retriever]) -> None:
    generator = make_generator(**NOTHING_ELSE)
    torch.nn.init.zeros_(generator.head.weight)
    graph = named_graph(generator)
    (response,) = make_retriever(GraphBackend(graph), graph.names).retrieve([RetrieveRequest(top_k=8)])
    assert [item.score for item in response.items] == pytest.approx([3 * np.log(0.5)] * 8, abs=1e-6)
    assert [item.item_id for item in response.items] == [f"i{row}" for row in range(7, -1, -1)]


def test_the_order_of_tied_beams_does_not_matter(make_retriever: Callable[..., Retriever]) -> None:
    class Backend:
        def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
            leaves = np.array([[5, 2, 7, 0, 0, 0, 0, 0]])
            scores = np.array([[-1.0, -1.0, -1.0, -0.5, *[-2e9] * 4]], np.float32)
            return Leaves(leaves, scores, np.zeros((1, 8, 3), np.float32))

    (response,) = make_retriever(Backend(), ("beams",)).retrieve([RetrieveRequest(top_k=8)])
    assert [item.item_id for item in response.items] == ["i7", "i5", "i2", "i0"]


class Seen:
    """A backend that keeps the histories it was given."""

    def __init__(self, backend: GraphBackend) -> None:
        self.backend = backend
        self.requests: Requests = {}

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        self.requests = {name: array for name, array in inputs.items() if name.startswith("history_")}
        return self.backend.run(inputs)


def shop(generator: Generator, ids: SemanticIds, **columns: Any) -> Retriever:
    """A retriever over items of such IDs; item 0 is called i0."""
    graph = named_graph(generator)
    table = pl.DataFrame(
        {
            "item_id": [f"i{row}" for row in range(ids.n_items)],
            "semantic_id": pl.Series(ids.codes).arr.to_list(),
            "popularity": np.arange(ids.n_items) % 3,
            "price": np.arange(ids.n_items) % 7,
            **columns,
        }
    )
    manifest = Manifest(
        genretrieval_version=__version__,
        n_items=ids.n_items,
        codebook_sizes=ids.codebook_sizes,
        opset=1,
        minimum_onnxruntime="1",
        graph_inputs=graph.names,
        max_history=8,
        max_query_tokens=4,
        reads_queries=False,
        beam_width=50,
        exclude_seen=False,
    )
    bundle = SimpleNamespace(
        manifest=manifest, features=RequestFeatures, catalogue=lambda: table, item_vectors=lambda: None
    )
    return Retriever(bundle, Seen(GraphBackend(graph)))


@pytest.fixture(scope="module")
def small_shop(plain: Generator, make_ids: Any) -> tuple[Retriever, dict[str, NDArray[np.float64]]]:
    """40 items of which some share a leaf, brand or parent; and for two histories the exact score of each item."""
    ids = make_ids(40, seed=11)
    brands = [None if row % 5 == 0 else f"brand{row % 4}" for row in range(40)]
    retriever = shop(plain, ids, brand=brands, categories=[[f"c{row % 3}", "all"][row % 2 :] for row in range(40)])
    scores = {}
    for history in ("i3 i17", "i8"):
        retriever.retrieve([asked(history)])
        by_leaf = dict(exact(plain, retriever.backend.requests, retriever.catalogue.index))
        scores[history] = np.asarray([by_leaf[leaf] for leaf in retriever.catalogue.index.item_leaves])
    return retriever, scores


def asked(history: str, **fields: Any) -> RetrieveRequest:
    return RetrieveRequest(history=[{"item_id": item, "event": "purchase"} for item in history.split()], **fields)


def values_of(column: pl.Series) -> list[Any]:
    return column.list.first().to_list() if isinstance(column.dtype, pl.List) else column.to_list()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_filters_exclusions_removals_and_collapse_are_exact_scoring_of_all_that_is_left(small_shop, data) -> None:
    """With a beam for every leaf the search is exhaustive: every item is scored, and the best are returned."""
    bundle_shop, scores = small_shop
    rows = st.sets(st.integers(0, 39), max_size=39)
    excluded, gone = data.draw(rows), data.draw(rows)
    retriever = bundle_shop.on(replace(bundle_shop.catalogue, gone=np.asarray(sorted(gone), np.int64)))
    low, brands = data.draw(st.integers(0, 7)), data.draw(st.none() | st.sets(st.sampled_from(["brand1", "brand2"])))
    attributes = {} if brands is None else {"brand": sorted(brands)}
    history, purchased = data.draw(st.sampled_from(sorted(scores))), data.draw(st.booleans())
    by = data.draw(st.sampled_from([None, "brand", "category", "price"]))
    cap, top_k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 45))
    request = asked(
        history,
        filters={"min_price": low, "attributes": attributes},
        exclude_item_ids=[f"i{row}" for row in sorted(excluded)],
        exclude_history="purchased" if purchased else "off",
        collapse_by=by,
        collapse_cap=cap,
        top_k=top_k,
    )
    table = retriever.catalogue.table
    left_out = excluded | gone | ({int(item[1:]) for item in history.split()} if purchased else set())
    allowed = [
        row
        for row in range(40)
        if row not in left_out and table["price"][row] >= low and (brands is None or table["brand"][row] in brands)
    ]
    leaves, popularity = retriever.catalogue.index.item_leaves, table["popularity"]
    allowed.sort(key=lambda row: (-round(scores[history][row], 5), leaves[row], -popularity[row], row))
    values = values_of(table[{"category": "categories", None: "price"}.get(by, by)])
    expected: list[int] = []
    for row in allowed:
        same = sum(values[other] == values[row] for other in expected)
        if by is None or values[row] is None or same < cap:
            expected.append(row)
    (response,) = retriever.retrieve([request])
    assert [item.item_id for item in response.items] == [f"i{row}" for row in expected[:top_k]]
    np.testing.assert_allclose(
        [item.score for item in response.items], scores[history][expected[:top_k]], rtol=0, atol=SAME
    )
    assert ("fewer_than_top_k" in response.degraded) == (len(expected) < top_k)

    # Few beams find other items, but none that is left out, and as many as there are.
    (narrow,) = retriever.retrieve([request.model_copy(update={"beam_width": 1})])
    found = [int(item.item_id[1:]) for item in narrow.items]
    assert set(found) <= set(allowed)
    if by is None:
        assert len(found) == min(top_k, len(allowed))
    else:
        assert all(value is None or [values[row] for row in found].count(value) <= cap for value in values)
        assert len(found) == min(top_k, len(expected))


def test_two_items_of_200_000_are_found_by_their_filter(make_generator: Any) -> None:
    sizes = (60, 60, 60)
    generator = make_generator(codebook_sizes=sizes, **NOTHING_ELSE)
    codes = np.random.default_rng(0).integers(0, 60, (200_000, 3)).astype(np.int32)
    rare = np.arange(200_000) % 100_000 == 77_777
    retriever = shop(generator, SemanticIds(codes, sizes), brand=np.where(rare, "rare", "other"))
    request = asked("i0", filters={"attributes": {"brand": ["rare"]}}, top_k=2, beam_width=2)
    (response,) = retriever.retrieve([request])
    assert {item.item_id for item in response.items} == {"i77777", "i177777"}
    (other,) = retriever.retrieve([request.model_copy(update={"exclude_item_ids": ["i77777"]})])
    assert [item.item_id for item in other.items] == ["i177777"]
