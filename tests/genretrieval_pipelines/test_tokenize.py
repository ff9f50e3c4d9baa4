from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from genretrieval.bundle import CODEBOOKS
from genretrieval.errors import DataError
from genretrieval.item_texts import item_texts
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval_pipelines import tokenize as tokenize_module
from genretrieval_pipelines.draft import draft_bundle, request_features
from genretrieval_pipelines.embed import EmbeddingPart, FittedEmbedding
from genretrieval_pipelines.recipe import Recipe
from genretrieval_pipelines.shop import Shop, open_shop
from genretrieval_pipelines.synth import ShopConfig, synthesize
from genretrieval_pipelines.tokenize import (
    REPORT,
    append_items,
    changes_of,
    encode_stream,
    fit_and_publish,
    fit_embedding,
    publish_shop,
    query_ids,
    read_report,
    tokenize,
    tokenizer_folder,
    training_queries,
)
from genretrieval_tokenizers.collisions import CollisionConfig
from genretrieval_tokenizers.family import fit_tokenizer
from genretrieval_tokenizers.publish import open_published
from genretrieval_tokenizers.rq_opq import RqOpq

QUIET = Console(quiet=True)
SMALL = {"method": "rq_kmeans", "codebook_sizes": [8, 8]}


def recipe(**tokenizer: object) -> Recipe:
    return Recipe.model_validate(
        {
            "embedding": [{"name": "collaborative", "dim": 8}, {"name": "hashing", "dim": 16}],
            "tokenizer": tokenizer if tokenizer.get("method") == "keyword_aligned" else {**SMALL, **tokenizer},
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
        {"method": "keyword_aligned"},
        {"method": "keyword_aligned", "content_sizes": [8]},
    ],
    ids=["plain", "balanced", "per_parent", "rq_opq", "quasid", "adaptive", "rk_fsq", "words", "words_and_content"],
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


def with_histories(shop: Shop, *sequences: list[int]) -> Shop:
    """The shop, had its users met these items and nothing else."""
    flat = np.array([item for sequence in sequences for item in sequence], np.int32)
    histories = replace(
        shop.histories,
        user_ids=[str(user) for user in range(len(sequences))],
        offsets=np.cumsum([0, *map(len, sequences)]).astype(np.int64),
        items=flat,
        events=np.zeros(len(flat), np.int16),
        times=np.zeros(len(flat), np.int64),
        query_rows=np.full(len(flat), -1, np.int32),
    )
    return replace(shop, histories=histories)


CONTRAST = {"method": "rq_vae", "epochs": 2, "contrast": {}}


class TestWhatTheDataDoNotAllow:
    """Single-item users are users, and say nothing about which items belong together."""

    @pytest.mark.parametrize("sequences", [(), ([0], [1], [1, 1])], ids=["none", "single items"])
    def test_is_left_out_and_said(self, shop: Shop, tmp_path: Path, sequences: tuple[list[int], ...]) -> None:
        silent = with_histories(shop, *sequences)
        tokenized = tokenize(recipe(**CONTRAST), silent, tmp_path)
        assert "Note: the embedding collaborative was left out: no user met two different items" in tokenized.report
        assert "Note: the contrast of the tokenizer was left out: no two users" in tokenized.report

    def test_a_recipe_without_any_of_it_shares_no_report(self, shop: Shop, tmp_path: Path) -> None:
        silent = with_histories(shop)
        tokenize(recipe(**CONTRAST), silent, tmp_path)
        plain = recipe(method="rq_vae", epochs=2).model_copy(update={"embedding": recipe().embedding[1:]})
        assert "left out:" not in tokenize(plain, silent, tmp_path).report

    def test_hashing_stands_in_for_nothing(self, shop: Shop, tmp_path: Path) -> None:
        silent = with_histories(shop, [0], [1])
        alone = recipe().model_copy(update={"embedding": recipe().embedding[:1]})
        text = fit_and_publish(alone, silent, tmp_path / "ids", tmp_path)
        assert "Note: nothing of the recipe's embedding is left, so items are embedded by hashing" in text
        assert [line for line in read_report(tmp_path / "ids").notes if "collaborative was left out" in line]
        assert query_ids(tmp_path / "ids", [item_texts(shop.items)[0]])[0][1]

    def test_items_that_nothing_tells_apart_are_refused(self, shop: Shop, tmp_path: Path) -> None:
        bare = replace(with_histories(shop), items=shop.items.select("item_id"))
        with pytest.raises(
            DataError, match=r"no item has words.*collaborative, hashing.*Fill title.*or add interactions.*column:NAME"
        ):
            tokenize(recipe(), bare, tmp_path)

    @pytest.mark.parametrize("method", ["rq_kmeans", "rq_opq", "rq_vae", "rk_fsq"])
    @pytest.mark.parametrize("n_items", [1, 12])
    def test_equal_items_and_a_single_one_get_ids(self, shop: Shop, tmp_path: Path, method: str, n_items: int) -> None:
        alike = pl.DataFrame({"item_id": [f"i{row}" for row in range(n_items)], "title": ["red shoe"] * n_items})
        tokenized = tokenize(recipe(method=method), replace(with_histories(shop), items=alike), tmp_path)
        assert len(np.unique(tokenized.ids.codes, axis=0)) == n_items
        assert "there are no more distinct vectors" in tokenized.report

    def test_rq_opq_says_when_it_is_fitted_without_queries(self, shop: Shop, tmp_path: Path) -> None:
        opq = recipe(method="rq_opq")
        assert "training queries: collaborative reads no words" in tokenize(opq, shop, tmp_path).report
        words = opq.model_copy(update={"embedding": opq.embedding[1:]})
        assert "training queries" not in tokenize(words, shop, tmp_path).report


def test_only_fitting_is_timed_and_items_are_encoded_once(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def traced(owner: object, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: called.append(name) or function(*a, **k))

    traced(tokenize_module.time, "perf_counter")
    traced(tokenize_module, "fit_tokenizer")
    traced(tokenize_module, "pairs_for")
    traced(FittedEmbedding, "queries")
    traced(RqOpq, "encode")
    words = recipe(method="rq_opq").model_copy(update={"embedding": recipe().embedding[1:]})
    tokenize(words, shop, tmp_path)
    at = called.index("fit_tokenizer")
    assert called[at - 1 : at + 2] == ["perf_counter", "fit_tokenizer", "perf_counter"]
    assert called.index("queries") < at
    assert called.count("encode") == 1


class TestFolder:
    """Another input never shares a folder."""

    X = np.zeros((120, 2), np.float32)

    def name(self, shop: Shop, **tokenizer: object) -> str:
        return tokenizer_folder(recipe(**tokenizer).tokenizer, CollisionConfig(), self.X, shop, recipe().embedding)

    def test_pairs_depend_on_whose_the_items_are(self, shop: Shop) -> None:
        one, other = with_histories(shop, [0, 1], [2, 3]), with_histories(shop, [0, 1, 2], [3])
        assert self.name(one, **CONTRAST) != self.name(other, **CONTRAST)
        assert self.name(one) == self.name(other)

    def test_words_depend_on_the_dictionary_and_the_texts(self, shop: Shop, tmp_path: Path) -> None:
        mined = self.name(shop, method="keyword_aligned")
        KeywordDictionary((Keyword("glass", AttributeType.MATERIAL),)).save(tmp_path / "keywords.parquet")
        assert self.name(replace(shop, data=tmp_path), method="keyword_aligned") != mined
        described = shop.items.with_columns(description=pl.lit("glass"))
        assert self.name(replace(shop, items=described), method="keyword_aligned") != mined

    def test_queries_depend_on_the_dictionary(self, shop: Shop, tmp_path: Path) -> None:
        mined = self.name(shop, method="rq_opq")
        KeywordDictionary((Keyword("glass", AttributeType.MATERIAL),)).save(tmp_path / "keywords.parquet")
        assert self.name(replace(shop, data=tmp_path), method="rq_opq") != mined


class TestWords:
    """Codes that come from words, in all that comes after fitting."""

    WANTED = recipe(method="keyword_aligned", content_sizes=[8])

    def test_the_shop_may_give_its_words(self, shop: Shop, tmp_path: Path) -> None:
        mined = tokenize(self.WANTED, shop, tmp_path)
        brand = shop.items["brand"][0]
        KeywordDictionary((Keyword(brand, AttributeType.BRAND),)).save(tmp_path / "keywords.parquet")
        given = tokenize(self.WANTED, replace(shop, data=tmp_path), tmp_path)
        assert mined.keywords is not None
        assert given.keywords is not None
        assert len(mined.keywords.dictionary) > 20
        assert [keyword.text for keyword in given.keywords.dictionary.keywords] == [brand]
        assert given.keywords.encode(f"{brand.upper()}s")[0] > 0
        assert "level 0 is of" in mined.report

    def test_a_query_shares_the_slots_of_its_words(self, shop: Shop, tmp_path: Path) -> None:
        fit_and_publish(self.WANTED, shop, tmp_path / "ids", tmp_path)
        [(codes, items)] = query_ids(tmp_path / "ids", [shop.items["title"][7]])
        published, keywords = open_published(tmp_path / "ids"), tokenize(self.WANTED, shop, tmp_path).keywords
        assert keywords is not None
        words = np.array(codes[: keywords.n_groups])
        shared = ((published.ids.codes[:, : len(words)] == words) & (words > 0)).sum(axis=1)
        assert shop.items["item_id"].index_of(items[0]) == shared.argmax()
        assert shared.max() == (words > 0).sum()
        assert query_ids(tmp_path / "ids", ["zzz"])[0][1] == []

    def test_its_bundle_says_which_slots_are_reserved(self, shop: Shop, tmp_path: Path) -> None:
        tokenized = tokenize(self.WANTED, shop, tmp_path)
        features = request_features(self.WANTED, shop, tokenized.keywords)
        manifest = draft_bundle(self.WANTED, shop, tokenized.ids, features).manifest
        n_groups = len(features.query_codes("hat"))
        assert manifest.reserved_slots == (*[10] * n_groups, 0, 0)  # none of content, none of the dedup level
        limits = np.subtract(manifest.codebook_sizes, manifest.reserved_slots)
        assert (tokenized.ids.codes < limits).all()

    def test_shards_hold_no_words(self, tmp_path: Path) -> None:
        (tmp_path / "shards").mkdir()
        pl.DataFrame({"item_id": ["a"], "embedding": [[0.0, 1.0]]}).write_parquet(tmp_path / "shards" / "0.parquet")
        with pytest.raises(DataError, match="shards hold vectors alone"):
            encode_stream(tmp_path / "shards", tmp_path / "ids", self.WANTED, console=QUIET)


class TestPublishing:
    @pytest.fixture(params=[{}, {"method": "keyword_aligned", "content_sizes": [8]}], ids=["vectors", "words"])
    def published(self, data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        """A shop of its first 100 items, published."""
        old = tmp_path / "old"
        old.mkdir()
        items = pl.read_parquet(data / "items.parquet")
        items.head(100).write_parquet(old / "items.parquet")
        known = items.head(100)["item_id"].to_list()
        interactions = pl.read_parquet(data / "interactions.parquet").filter(pl.col("item_id").is_in(known))
        interactions.write_parquet(old / "interactions.parquet")
        (tmp_path / "work").mkdir()
        wanted = recipe(**request.param)
        fit_and_publish(wanted, open_shop(old, tmp_path / "work"), tmp_path / "published", tmp_path / "work")
        return tmp_path / "published"

    def test_new_items_are_appended_and_no_id_moves(self, published: Path, shop: Shop) -> None:
        before = open_published(published)
        lines = append_items(published, shop)
        after = open_published(published)
        assert after.ids.n_items == 120
        np.testing.assert_array_equal(after.ids.codes[:100], before.ids.codes)
        assert lines[0] == "20 items appended to 100; no published ID moved"
        assert append_items(published, shop) == ["no item is new; 120 IDs stay as they are"]

    def test_new_items_are_a_change_of_a_bundle_without_them(self, published: Path, shop: Shop) -> None:
        append_items(published, shop)
        all_ids = open_published(published)

        def served(items: pl.DataFrame, codebooks: str = all_ids.fingerprint) -> Any:
            return SimpleNamespace(catalogue=lambda: items, manifest=SimpleNamespace(files={CODEBOOKS: codebooks}))

        change = changes_of(published, shop, served(shop.items[:115].drop("brand")))
        assert change is not None
        assert change.codebooks == all_ids.fingerprint
        assert change.table["semantic_id"].to_list() == all_ids.ids.codes[115:].tolist()
        expected = shop.items[115:].drop("brand")
        assert change.table.select(expected.columns).equals(expected)
        assert changes_of(published, shop, served(shop.items)) is None
        with pytest.raises(DataError, match="other codebooks than the bundle"):
            changes_of(published, shop, served(shop.items, "others"))

    def test_appending_in_parts_without_the_old_items_is_appending_at_once(
        self, published: Path, shop: Shop, tmp_path: Path
    ) -> None:
        shutil.copytree(published, tmp_path / "once")
        append_items(tmp_path / "once", shop)
        shutil.rmtree(tmp_path / "work")  # nothing is read but the folder
        append_items(published, replace(shop, items=shop.items[100:107]))
        append_items(published, replace(shop, items=shop.items[105:]))
        at_once, in_parts = open_published(tmp_path / "once"), open_published(published)
        assert at_once.item_ids == in_parts.item_ids
        np.testing.assert_array_equal(at_once.ids.codes, in_parts.ids.codes)

    def test_a_query_has_the_same_codes_after_an_append(self, published: Path, shop: Shop) -> None:
        query = [item_texts(shop.items)[3]]
        [(before, _)] = query_ids(published, query)
        append_items(published, shop)
        [(after, _)] = query_ids(published, query)
        assert before == after

    def test_a_keyword_dictionary_that_changes_later_moves_no_query(self, shop: Shop, tmp_path: Path) -> None:
        enhanced = recipe().model_copy(update={"embedding": [EmbeddingPart(name="hashing", dim=16, keywords=True)]})
        data = replace(shop, data=tmp_path)
        KeywordDictionary((Keyword("glass", AttributeType.MATERIAL),)).save(tmp_path / "keywords.parquet")
        fit_and_publish(enhanced, data, tmp_path / "ids", tmp_path / "work")
        used = FittedEmbedding.load(tmp_path / "ids").keywords
        (tmp_path / "keywords.parquet").unlink()
        assert used is not None
        assert [keyword.text for keyword in used.keywords] == ["glass"]

    def test_a_twin_of_an_old_item_has_the_codes_of_its_words(self, published: Path, shop: Shop) -> None:
        twins = [shop.items.head(1).with_columns(item_id=pl.lit(name)) for name in ("twin", "triplet")]
        append_items(published, replace(shop, items=pl.concat(twins)))
        codes = open_published(published).ids.codes[-2:]
        np.testing.assert_array_equal(codes[0, :-1], codes[1, :-1])
        assert codes[1, -1] == codes[0, -1] + 1

    def test_the_report_counts_appended_items(self, published: Path, shop: Shop) -> None:
        before = read_report(published)
        append_items(published, shop)
        after = read_report(published)
        assert (before.n_items, after.n_items) == (100, 120)
        assert after.fit_seconds == before.fit_seconds
        assert after.reconstruction_error is None
        assert after.notes[-1] == "figures that compare items with their embeddings are left out"
        assert "| n_items | 120 |" in (published / "report.md").read_text("utf-8")

    def test_a_report_that_an_append_did_not_reach_is_written_by_the_next(self, published: Path, shop: Shop) -> None:
        stale = (published / REPORT).read_text("utf-8")
        append_items(published, shop)
        (published / REPORT).write_text(stale, "utf-8")
        append_items(published, shop)
        assert read_report(published).n_items == 120

    def test_publishing_twice_is_refused(self, published: Path, shop: Shop, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="re-key every published ID"):
            fit_and_publish(recipe(), shop, published, tmp_path / "work")

    def test_ids_without_a_report_keep_and_get_it(self, shop: Shop, tmp_path: Path) -> None:
        folder = tmp_path / "ids"
        complete = fit_and_publish(recipe(), shop, folder, tmp_path)
        measured = read_report(folder)
        (folder / REPORT).unlink()
        kept = {name: (folder / name).read_bytes() for name in ("published.json", "semantic_ids.parquet")}
        fit_and_publish(recipe(), shop, folder, tmp_path)
        assert {name: (folder / name).read_bytes() for name in kept} == kept
        assert read_report(folder) == replace(measured, fit_seconds=None)
        assert "fit_seconds" in complete

    def test_ids_of_another_recipe_or_shop_get_no_report(self, shop: Shop, tmp_path: Path) -> None:
        folder = tmp_path / "ids"
        fit_and_publish(recipe(), shop, folder, tmp_path)
        (folder / REPORT).unlink()
        with pytest.raises(DataError, match="re-key every published ID"):
            fit_and_publish(recipe(seed=1), shop, folder, tmp_path)
        with pytest.raises(DataError, match="re-key every published ID"):
            fit_and_publish(recipe(), replace(shop, items=shop.items.reverse()), folder, tmp_path)
        assert open_published(folder).ids.n_items == 120

    def test_publishing_into_a_folder_that_is_no_cache_takes_nothing_back(
        self, published: Path, shop: Shop, tmp_path: Path
    ) -> None:
        (published / REPORT).unlink()
        with pytest.raises(DataError, match="re-key every published ID"):
            publish_shop(published, recipe().tokenizer, CollisionConfig(), recipe().embedding, shop, tmp_path)
        assert open_published(published).ids.n_items == 100

    def test_a_cache_that_was_cut_off_before_its_report_is_used(
        self, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = tokenize(recipe(), shop, tmp_path)
        (first.codebooks.parent / REPORT).unlink()
        monkeypatch.setattr(tokenize_module, "fit_tokenizer", None)
        np.testing.assert_array_equal(tokenize(recipe(), shop, tmp_path).ids.codes, first.ids.codes)


class TestQueries:
    def test_a_query_that_says_what_an_item_says_has_its_codes(self, shop: Shop, tmp_path: Path) -> None:
        wanted = Recipe.model_validate(
            {"embedding": [{"name": "hashing", "dim": 16}], "tokenizer": {"method": "rq_opq", "codebook_sizes": [8, 8]}}
        )
        fit_and_publish(wanted, shop, tmp_path / "published", tmp_path)
        [(codes, items)] = query_ids(tmp_path / "published", [item_texts(shop.items)[7]])
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
        mined = fit_embedding(parts, shop, tmp_path)[0].keywords
        assert mined is not None
        assert len(mined) > 1
        KeywordDictionary((Keyword("glass", AttributeType.MATERIAL),)).save(tmp_path / "keywords.parquet")
        given = fit_embedding(parts, replace(shop, data=tmp_path), tmp_path)[0].keywords
        assert given is not None
        assert len(given) == 1


class TestStream:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        return self.write(tmp_path / "shards", seed=0)

    def write(self, folder: Path, seed: int) -> Path:
        x = np.random.default_rng(seed).standard_normal((50, 4)).astype(np.float32)
        folder.mkdir(exist_ok=True)
        table = pa.table({"item_id": [f"i{n}" for n in range(50)], "embedding": list(x), "other": list(x[::-1])})
        pq.write_table(table, folder / "0.parquet")
        return folder

    def test_fits_on_a_sample_publishes_all_and_reports(self, shards: Path, tmp_path: Path) -> None:
        published = encode_stream(shards, tmp_path / "ids", recipe(), sample=20, console=QUIET)
        assert published.ids.n_items == open_published(tmp_path / "ids").ids.n_items == 50
        measured = read_report(tmp_path / "ids")
        assert (measured.n_items, measured.reconstruction_error) == (50, None)
        assert "| n_items | 50 |" in (tmp_path / "ids" / "report.md").read_text("utf-8")
        assert not list((tmp_path / "ids").glob("fitted-*"))

    def test_a_tokenizer_that_exists_gives_the_same_ids(self, shards: Path, tmp_path: Path) -> None:
        first = encode_stream(shards, tmp_path / "ids", recipe(), sample=20, console=QUIET)
        codebooks = tmp_path / "ids" / "codebooks.safetensors"
        second = encode_stream(shards, tmp_path / "two", recipe(), codebooks=codebooks, console=QUIET)
        np.testing.assert_array_equal(first.ids.codes, second.ids.codes)

    def test_a_tokenizer_that_is_missing_is_not_fitted(self, shards: Path, tmp_path: Path) -> None:
        missing = tmp_path / "typo.safetensors"
        with pytest.raises(DataError, match=r"typo\.safetensors cannot be read"):
            encode_stream(shards, tmp_path / "ids", recipe(), codebooks=missing, console=QUIET)
        assert not missing.exists()

    @pytest.mark.parametrize("given", [{"sample": 20}, {"seed": 0}])
    def test_a_sample_beside_a_tokenizer_is_refused(self, shards: Path, tmp_path: Path, given: dict[str, int]) -> None:
        with pytest.raises(DataError, match="leave out --sample"):
            encode_stream(shards, tmp_path / "ids", recipe(), codebooks=tmp_path / "t", console=QUIET, **given)

    @pytest.mark.parametrize(
        "changed",
        [{"recipe": recipe(seed=1)}, {"sample": 21}, {"seed": 1}, {"column": "other"}, {"shards": 1}],
        ids=str,
    )
    def test_what_was_fitted_to_anything_else_is_not_taken_for_it(
        self, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
    ) -> None:
        fits: list[int] = []
        monkeypatch.setattr(
            tokenize_module, "fit_tokenizer", lambda x, config: fits.append(len(x)) or fit_tokenizer(x, config)
        )
        monkeypatch.setattr(tokenize_module, "encode_shards", lambda *a, **k: 1 / 0)

        def cut_off(recipe: Recipe, **given: Any) -> int:
            with pytest.raises(ZeroDivisionError):
                encode_stream(shards, tmp_path / "ids", recipe, **{"sample": 20, "console": QUIET, **given})
            return len(fits)

        assert cut_off(recipe()) == cut_off(recipe()) == 1
        if "shards" in changed:
            self.write(shards, seed=changed.pop("shards"))
        assert cut_off(changed.pop("recipe", recipe()), **changed) == 2

    def test_what_would_be_refused_is_refused_before_the_fit(
        self, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encode_stream(shards, tmp_path / "ids", recipe(), sample=20, console=QUIET)
        monkeypatch.setattr(tokenize_module, "fit_tokenizer", None)
        with pytest.raises(DataError, match="re-key every published ID"):
            encode_stream(shards, tmp_path / "ids", recipe(), console=QUIET)
        reassigned = recipe().model_copy(update={"collisions": CollisionConfig(method="reassign")})
        with pytest.raises(DataError, match="reassign"):
            encode_stream(shards, tmp_path / "two", reassigned, console=QUIET)
        with pytest.raises(DataError, match="tokenize fit"):
            encode_stream(shards, tmp_path / "two", recipe(**CONTRAST), console=QUIET)

    def test_ids_without_a_report_get_it(self, shards: Path, tmp_path: Path) -> None:
        encode_stream(shards, tmp_path / "ids", recipe(), sample=20, console=QUIET)
        (tmp_path / "ids" / REPORT).unlink()
        encode_stream(shards, tmp_path / "ids", recipe(), sample=20, console=QUIET)
        assert read_report(tmp_path / "ids").n_items == 50

    def test_appending_and_asking_name_the_way(self, shards: Path, shop: Shop, tmp_path: Path) -> None:
        encode_stream(shards, tmp_path / "ids", recipe(), sample=20, console=QUIET)
        with pytest.raises(DataError, match=r"publish\.append.*--tokenizer .*ids/codebooks\.safetensors"):
            append_items(tmp_path / "ids", shop)
        with pytest.raises(DataError, match="embeddings made elsewhere"):
            query_ids(tmp_path / "ids", ["red"])
