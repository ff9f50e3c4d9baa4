from __future__ import annotations

import numpy as np
import pytest

from genretrieval.features import GAP_SECONDS, N_GAPS, RequestFeatures
from genretrieval.histories import NO_TIME
from genretrieval.keyword_codebook import KeywordCodebook
from genretrieval.keywords import AttributeType, Keyword, KeywordDictionary
from genretrieval_pipelines.queries import train_query_tokenizer

MINUTE, HOUR, DAY = 60, 3600, 86400


def test_gap_buckets_by_hand() -> None:
    gaps = [0, 1, 10 * MINUTE - 1, 10 * MINUTE, HOUR, 6 * HOUR, DAY, DAY + 1, 365 * DAY, 9999 * DAY]
    times = np.cumsum([1000, *gaps]).astype(np.int64)
    buckets = RequestFeatures.gap_buckets(times)
    assert buckets.tolist() == [0, 1, 2, 2, 3, 4, 5, 5, 6, 11, 11]
    assert buckets.max() == N_GAPS - 1 == len(GAP_SECONDS) + 1


def test_a_gap_to_an_unknown_time_is_unknown() -> None:
    times = np.array([50, NO_TIME, 60, 61], np.int64)
    assert RequestFeatures.gap_buckets(times).tolist() == [0, 0, 0, 2]
    assert RequestFeatures.gap_buckets(times[:0]).tolist() == []
    assert RequestFeatures.gap_buckets(times[:1]).tolist() == [0]


def test_unknown_events_share_id_0() -> None:
    features = RequestFeatures(events=("cart", "click"))
    assert features.event_ids(["click", "gift", "cart", ""]).tolist() == [2, 0, 1, 0]
    assert features.n_events == 3
    assert features.event_ids([]).dtype == np.int64


def test_queries_are_cut() -> None:
    tokenizer = train_query_tokenizer(["red shoe", "red shoe", "blue shoe", "blue shoe"], 200)
    features = RequestFeatures(query_tokenizer=tokenizer.to_str(), max_query_tokens=2)
    assert features.query_vocab_size == tokenizer.get_vocab_size()
    whole = tokenizer.encode("red blue shoe", add_special_tokens=False).ids
    assert len(whole) == 3
    assert features.query_tokens("red blue shoe").tolist() == whole[:2]


@pytest.mark.parametrize("query", [None, "", "?!"])
def test_a_query_without_words_has_no_tokens(query: str | None) -> None:
    tokenizer = train_query_tokenizer(["red shoe"] * 2, 50)
    assert RequestFeatures(query_tokenizer=tokenizer.to_str()).query_tokens(query).tolist() == []


def test_a_model_without_queries_reads_none() -> None:
    features = RequestFeatures()
    assert features.query_tokens("red shoe").tolist() == []
    assert features.query_vocab_size == 0


def test_profile_ids_are_the_same_on_every_machine() -> None:
    features = RequestFeatures(profile_features=("age", "city"), n_profile_buckets=1000)
    # blake2b of "age=30" and "city=None", 8 bytes, big endian, modulo 1000.
    assert features.profile_ids({"age": "30", "hobby": "chess"}).tolist() == [997, 384]
    assert features.profile_ids({"age": 30}).tolist() == [997, 384]


def test_the_feature_s_name_is_part_of_its_hash() -> None:
    features = RequestFeatures(profile_features=("a", "b"), n_profile_buckets=2**40)
    one, other = features.profile_ids({"a": "x", "b": "x"})
    assert one != other


def test_a_query_has_slots_where_the_model_has_keywords() -> None:
    dictionary = KeywordDictionary((Keyword("shoe", AttributeType.ENTITY),))
    groups = ((AttributeType.ENTITY,), (AttributeType.BRAND,))
    keywords = KeywordCodebook(dictionary, groups, np.array([1], np.int32), (4, 3), (2, 2))
    features = RequestFeatures(keywords=keywords)
    assert features.query_codes("red shoes").tolist() == [1, 0]
    assert features.query_codes(None).tolist() == [0, 0]
    assert features.query_codes("").dtype == np.int64
    assert RequestFeatures().query_codes("red shoes").tolist() == []
