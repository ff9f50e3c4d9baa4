from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from genretrieval.features import RequestFeatures
from genretrieval.histories import NO_QUERY, NO_TIME, Histories
from genretrieval.training.data import HistoryDataset, collate, cut_windows
from genretrieval_pipelines.queries import (
    has_queries,
    made_queries,
    split_queries,
    train_query_tokenizer,
    with_made_queries,
    with_query_pairs,
)

ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c"],
        "title": ["Red shoe", "  Blue shoe ", None],
        "brand": ["Acme", None, "Umbra"],
        "categories": [["Clothing", "Shoes"], ["Shoes"], []],
    },
    schema_overrides={"categories": pl.List(pl.String)},
)


def pairs(**columns: list[Any]) -> pl.DataFrame:
    return pl.DataFrame(columns, schema_overrides={"item_row": pl.Int32})


def test_made_queries_by_hand() -> None:
    made = made_queries(ITEMS)
    assert set(made.rows()) == {
        ("Red shoe", 0),
        ("Blue shoe", 1),
        ("Acme", 0),
        ("Umbra", 2),
        ("Shoes", 0),
        ("Shoes", 1),
        ("Acme Shoes", 0),
    }
    assert len(made) == 7
    assert made.schema == {"query": pl.String, "item_row": pl.Int32}


def test_made_queries_of_a_bare_catalogue() -> None:
    assert made_queries(ITEMS.select("item_id", "title"))["query"].to_list() == ["Red shoe", "Blue shoe"]
    assert made_queries(ITEMS.select("item_id", "brand"))["item_row"].to_list() == [0, 2]
    nothing = made_queries(ITEMS.select("item_id"))
    assert len(nothing) == 0
    assert nothing.schema == {"query": pl.String, "item_row": pl.Int32}


def test_a_query_is_split_by_its_text_alone() -> None:
    # crc32 / 2**32 of the text: 0.90 and 0.95 are the borders.
    made = split_queries(pairs(query=[f"query {i}" for i in range(2000)] * 2, item_row=list(range(4000))))
    assert (made["split"][:2000] == made["split"][2000:]).all()
    shares = made["split"].value_counts(normalize=True)
    found = dict(zip(shares["split"], shares["proportion"], strict=True))
    assert found["train"] == pytest.approx(0.9, abs=0.02)
    assert found["validation"] == pytest.approx(0.05, abs=0.015)
    assert found["test"] == pytest.approx(0.05, abs=0.015)
    backwards = split_queries(made.drop("split").reverse())
    assert backwards.reverse().equals(made)


def test_splits_are_the_same_on_every_machine() -> None:
    made = split_queries(pairs(query=["red shoe", "blue hat", "鞋", "q37", "q23"], item_row=[0] * 5))
    assert made["split"].to_list() == ["train", "train", "train", "validation", "test"]


def test_splits_in_the_data_are_kept() -> None:
    given = pairs(query=["a", "b", "c"], item_row=[0, 1, 2], split=["test", None, "validation"])
    assert split_queries(given)["split"].to_list() == ["test", "train", "validation"]
    unsaid = pairs(query=["a"], item_row=[0]).with_columns(split=pl.lit(None, pl.String))
    assert split_queries(unsaid)["split"].null_count() == 0


def test_no_pairs_split_into_none() -> None:
    assert len(split_queries(pairs(query=[], item_row=[]))) == 0


def no_histories() -> Histories:
    return Histories(
        [], np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.int16), np.empty(0, np.int64),
        np.empty(0, np.int32), (), [], "none",
    )  # fmt: skip


def test_pairs_become_visitors_of_one_interaction(make_histories: Any) -> None:
    before = make_histories(n_users=3)
    n = len(before.items)
    after = with_query_pairs(before, pairs(query=["red", "new", "new"], item_row=[4, 5, 6]))
    assert after.n_users == 6
    assert after.offsets.tolist() == [*before.offsets.tolist(), n + 1, n + 2, n + 3]
    assert after.items[n:].tolist() == [4, 5, 6]
    assert after.items[:n].tolist() == before.items.tolist()
    assert [after.queries[row] for row in after.query_rows[n:]] == ["red", "new", "new"]
    assert after.queries[: len(before.queries)] == before.queries
    assert after.times[n:].tolist() == [NO_TIME] * 3
    dtypes = [a.dtype for a in (after.offsets, after.items, after.events, after.times, after.query_rows)]
    assert dtypes == [np.int64, np.int32, np.int16, np.int64, np.int32]


def test_a_shop_without_interactions_trains_on_pairs(make_ids: Any) -> None:
    histories = with_query_pairs(no_histories(), pairs(query=["red", "blue"], item_row=[1, 0]))
    features = RequestFeatures(query_tokenizer=train_query_tokenizer(["red blue"] * 2, 50).to_str())
    windows = cut_windows(histories.offsets, histories.offsets[1:], 8)
    dataset = HistoryDataset(histories, windows, make_ids(5), features, np.zeros((2, 0), np.int64))
    batch = collate([dataset[0], dataset[1]])
    assert batch["target_items"].tolist() == [[1], [0]]
    assert batch["query_rows"].tolist() == [0, 1]
    assert batch["history_codes"].shape == (2, 0, 3)


def test_an_event_of_a_pair_is_no_event_of_the_shop(make_histories: Any, make_ids: Any) -> None:
    before = make_histories(n_users=2)
    after = with_query_pairs(before, pairs(query=["red"], item_row=[3]))
    features = RequestFeatures(events=("click", "purchase"))
    windows = cut_windows(after.offsets, after.offsets[1:], 8)
    dataset = HistoryDataset(after, windows, make_ids(30), features, np.zeros((3, 0), np.int64))
    assert dataset[len(dataset) - 1]["events"].tolist() == [0]
    assert 0 not in dataset[0]["events"]


def test_has_queries(make_histories: Any) -> None:
    histories = make_histories()
    assert has_queries(histories)
    histories.query_rows[:] = NO_QUERY
    assert not has_queries(histories)
    assert not has_queries(no_histories())


CORPUS = [
    "Crème brûlée 300ml",
    "creme BRULEE",
    "红色 运动鞋",
    "红色跑鞋",
    "蓝色跑鞋",
    "running shoe 42",
    "running shoes",
] * 3


def pieces(text: str) -> list[str]:
    return train_query_tokenizer(CORPUS, 400).encode(text, add_special_tokens=False).tokens


def test_accents_and_case_do_not_matter() -> None:
    assert pieces("CRÈME Brûlée") == pieces("creme brulee")
    # Full-width letters and digits are the plain ones.
    assert pieces("ｓｈｏｅ ４２") == pieces("shoe 42")


def test_chinese_has_no_spaces_and_needs_none() -> None:
    assert "[UNK]" not in pieces("红色跑鞋")
    assert "".join(pieces("红色跑鞋")).replace("▁", "") == "红色跑鞋"
    # A new combination of known characters is readable.
    assert "[UNK]" not in pieces("蓝色运动鞋")


def test_words_of_the_shop_are_single_tokens() -> None:
    assert pieces("running") == ["▁running"]
    assert pieces("running, shoe!") == ["▁running", "▁shoe"]


def test_an_unknown_character_is_one_unknown_token() -> None:
    assert pieces("λ")[-1] == "[UNK]"


def test_padding_is_0_and_the_tokenizer_survives_the_bundle() -> None:
    tokenizer = train_query_tokenizer(CORPUS, 400)
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.token_to_id("[UNK]") == 1
    assert tokenizer.get_vocab_size() <= 400
    features = RequestFeatures(query_tokenizer=tokenizer.to_str())
    for query in CORPUS[:7]:
        ids = features.query_tokens(query).tolist()
        assert ids == tokenizer.encode(query, add_special_tokens=False).ids
        assert ids
        assert 0 not in ids


@pytest.mark.parametrize("corpus", [[], ["", "  ", "?!"]])
def test_an_empty_corpus_makes_a_tokenizer_that_knows_no_word(corpus: list[str]) -> None:
    tokenizer = train_query_tokenizer(corpus, 100)
    features = RequestFeatures(query_tokenizer=tokenizer.to_str())
    assert features.query_vocab_size >= 2
    assert set(features.query_tokens("red shoe").tolist()) <= {1}


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_query_tokenizer(CORPUS, 400).to_str() == train_query_tokenizer(CORPUS, 400).to_str()


def test_interactions_without_a_query_get_one_of_their_item() -> None:
    histories = replace(
        no_histories(),
        offsets=np.asarray([0, 3, 5]),
        items=np.asarray([0, 1, 2, 2, 0], np.int32),
        queries=["typed"],
        query_rows=np.asarray([0, NO_QUERY, NO_QUERY, NO_QUERY, NO_QUERY], np.int32),
    )
    made = pl.DataFrame(
        {"query": ["red shoe", "acme", "blue hat"], "item_row": [2, 2, 0]},
        schema={"query": pl.String, "item_row": pl.Int32},
    )
    found = with_made_queries(histories, made, 1.0, seed=0)
    said = [None if row == NO_QUERY else found.queries[row] for row in found.query_rows]
    # What was typed stays; item 1 is called nothing; item 2 has two names.
    assert said[0] == "typed"
    assert said[1] is None
    assert {said[2], said[3]} <= {"red shoe", "acme"}
    assert said[4] == "blue hat"
    again = with_made_queries(histories, made, 1.0, seed=0)
    assert again.query_rows.tolist() == found.query_rows.tolist()
    assert with_made_queries(histories, made, 0.0, seed=0).query_rows.tolist() == histories.query_rows.tolist()
