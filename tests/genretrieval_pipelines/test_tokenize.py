from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from genretrieval.errors import DataError
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval_pipelines.embed import EmbeddingPart, item_texts
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_pipelines.tokenize import (
    append_items,
    encode_stream,
    fit_and_publish,
    query_ids,
    shop_keywords,
    tokenize,
    training_queries,
)
from genretrieval_tokenizers.publish import open_published

QUIET = Console(quiet=True)
SMALL = {"method": "rq_kmeans", "codebook_sizes": [8, 8]}


def recipe(**tokenizer: object) -> Recipe:
    return Recipe.model_validate(
        {
            "embedding": [{"name": "collaborative", "dim": 8}, {"name": "hashing", "dim": 16}],
            "tokenizer": {**SMALL, **tokenizer},
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    synthesize(folder, ShopConfig(n_items=120, n_users=30, seed=3))
    return folder


@pytest.fixture(scope="module")
def shop(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(data, tmp_path_factory.mktemp("checked"))


@pytest.mark.parametrize(
    "tokenizer",
    [
        SMALL,
        {"method": "rq_kmeans", "codebook_sizes": [8, 8], "last_level": "balanced"},
        {"method": "rq_kmeans", "codebook_sizes": [8, 8], "last_level": "per_parent"},
        {"method": "rq_opq", "codebook_sizes": [8, 8]},
        {"method": "rq_vae", "codebook_sizes": [8, 8], "epochs": 2, "contrast": {}, "repulsion": {"kind": "hamming"}},
        {"method": "rq_vae", "codebook_sizes": [8, 8], "epochs": 2, "repulsion": {"kind": "adaptive"}},
        {"method": "rk_fsq", "codebook_sizes": [8], "n_bits": 3, "steps": 5},
    ],
    ids=["plain", "balanced", "per_parent", "rq_opq", "quasid", "adaptive", "rk_fsq"],
)
def test_every_method_gives_every_item_an_id_of_its_own(
    shop: Shop, tmp_path: Path, tokenizer: dict[str, object]
) -> None:
    wanted = Recipe.model_validate({"embedding": [{"name": "hashing", "dim": 16}], "tokenizer": tokenizer})
    tokenized = tokenize(wanted, shop, tmp_path)
    assert len(np.unique(tokenized.ids.codes, axis=0)) == len(shop.items)
    assert "collision_rate" in tokenized.report
    again = tokenize(wanted, shop, tmp_path)
    np.testing.assert_array_equal(again.ids.codes, tokenized.ids.codes)


def test_a_shop_without_interactions_is_tokenized_without_what_reads_them(shop: Shop, tmp_path: Path) -> None:
    first = shop.histories
    empty = replace(
        first, user_ids=[], offsets=np.zeros(1, np.int64), items=first.items[:0], query_rows=first.items[:0]
    )
    silent = replace(shop, histories=empty)
    wanted = recipe(method="rq_vae", epochs=2, contrast={})
    tokenized = tokenize(wanted, silent, tmp_path)
    assert "No interactions, so the embedding collaborative was left out" in tokenized.report
    assert "No interactions, so the contrast of the tokenizer was left out" in tokenized.report


class TestPublishing:
    @pytest.fixture
    def published(self, data: Path, tmp_path: Path) -> Path:
        """A shop of its first 100 items, published."""
        old = tmp_path / "old"
        old.mkdir()
        items = pl.read_parquet(data / "items.parquet")
        items.head(100).write_parquet(old / "items.parquet")
        known = items.head(100)["item_id"].to_list()
        interactions = pl.read_parquet(data / "interactions.parquet").filter(pl.col("item_id").is_in(known))
        interactions.write_parquet(old / "interactions.parquet")
        (tmp_path / "work").mkdir()
        fit_and_publish(recipe(), open_shop(old, tmp_path / "work"), tmp_path / "published", tmp_path / "work")
        return tmp_path / "published"

    def test_new_items_are_appended_and_no_id_moves(self, published: Path, shop: Shop, tmp_path: Path) -> None:
        before = open_published(published)
        lines = append_items(published, shop, tmp_path / "work")
        after = open_published(published)
        assert after.ids.n_items == 120
        np.testing.assert_array_equal(after.ids.codes[:100], before.ids.codes)
        assert lines[0] == "20 items appended to 100; no published ID moved"
        assert append_items(published, shop, tmp_path / "work") == ["no item is new; 120 IDs stay as they are"]

    def test_a_new_item_equal_in_text_to_an_old_one_gets_the_codes_of_its_text(
        self, published: Path, shop: Shop, tmp_path: Path
    ) -> None:
        twin = shop.items.head(1).with_columns(item_id=pl.lit("twin"))
        other = replace(
            shop, items=pl.concat([shop.items.head(100), twin, twin.with_columns(item_id=pl.lit("triplet"))])
        )
        append_items(published, other, tmp_path / "work")
        codes = open_published(published).ids.codes[-2:]
        np.testing.assert_array_equal(codes[0, :-1], codes[1, :-1])
        assert codes[1, -1] == codes[0, -1] + 1

    def test_publishing_twice_is_refused(self, published: Path, shop: Shop, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="re-key every published ID"):
            fit_and_publish(recipe(), shop, published, tmp_path / "work")

    def test_half_an_item_table_is_refused(self, published: Path, shop: Shop, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="20 of 100 published items are not in the item table"):
            append_items(published, replace(shop, items=shop.items.tail(100)), tmp_path / "work")


class TestQueries:
    def test_a_query_that_says_what_an_item_says_has_its_codes(self, shop: Shop, tmp_path: Path) -> None:
        wanted = Recipe.model_validate(
            {"embedding": [{"name": "hashing", "dim": 16}], "tokenizer": {"method": "rq_opq", "codebook_sizes": [8, 8]}}
        )
        fit_and_publish(wanted, shop, tmp_path / "published", tmp_path)
        [(codes, items)] = query_ids(tmp_path / "published", shop, [item_texts(shop.items)[7]], tmp_path)
        published = open_published(tmp_path / "published").ids.codes
        assert codes == published[7, :-1].tolist()
        assert shop.items["item_id"][7] in items

    def test_training_queries_leave_out_what_is_evaluated(self, shop: Shop) -> None:
        h = shop.histories
        rows = [h.query_rows[start : max(start, end - 2)] for start, end in pairwise(h.offsets)]
        expected = {h.queries[row] for row in np.concatenate(rows) if row >= 0}
        assert expected <= set(training_queries(shop)) < set(h.queries)

    def test_a_given_dictionary_comes_before_a_mined_one(self, shop: Shop, tmp_path: Path) -> None:
        parts = [EmbeddingPart(name="hashing", keywords=True)]
        mined = shop_keywords(parts, shop)
        assert mined is not None
        assert len(mined) > 1
        KeywordDictionary((Keyword("glass", AttributeType.MATERIAL),)).save(tmp_path / "keywords.parquet")
        given = shop_keywords(parts, replace(shop, data=tmp_path))
        assert given is not None
        assert len(given) == 1


class TestStream:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
        folder = tmp_path / "shards"
        folder.mkdir()
        table = pa.table({"item_id": [f"i{n}" for n in range(50)], "embedding": list(x)})
        pq.write_table(table, folder / "0.parquet")
        return folder

    def test_fits_on_a_sample_and_publishes_all(self, shards: Path, tmp_path: Path) -> None:
        published = encode_stream(shards, tmp_path / "ids", recipe(), None, "embedding", "item_id", 20, 0, QUIET)
        assert published.ids.n_items == open_published(tmp_path / "ids").ids.n_items == 50

    def test_a_tokenizer_that_exists_gives_the_same_ids(self, shards: Path, tmp_path: Path) -> None:
        first = encode_stream(shards, tmp_path / "ids", recipe(), None, "embedding", "item_id", 20, 0, QUIET)
        codebooks = tmp_path / "ids" / "codebooks.safetensors"
        second = encode_stream(shards, tmp_path / "two", recipe(), codebooks, "embedding", "item_id", 20, 0, QUIET)
        np.testing.assert_array_equal(first.ids.codes, second.ids.codes)

    def test_a_tokenizer_that_needs_pairs_says_what_to_do(self, shards: Path, tmp_path: Path) -> None:
        wanted = recipe(method="rq_vae", contrast={})
        with pytest.raises(DataError, match="tokenize fit"):
            encode_stream(shards, tmp_path / "ids", wanted, None, "embedding", "item_id", 20, 0, QUIET)
