from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval import metrics
from genretrieval.errors import InvalidInputError
from genretrieval.metrics import NOTHING, SidGroups

# Three cases: first hit on place 2; one of two relevant items on place 1, the other absent; nothing found.
RANKED = np.array([[4, 7, 1], [2, 0, NOTHING], [5, 6, 8]], np.int32)
RELEVANT = np.array([7, 2, 9, 3], np.int32)
OFFSETS = np.array([0, 1, 3, 4], np.int64)


def test_hits_marks_the_places() -> None:
    assert metrics.hits(RANKED, RELEVANT, OFFSETS).tolist() == [
        [False, True, False],
        [True, False, False],
        [False] * 3,
    ]


def test_recall_by_hand() -> None:
    assert metrics.recall(RANKED, RELEVANT, OFFSETS, 1).tolist() == [0.0, 0.5, 0.0]
    assert metrics.recall(RANKED, RELEVANT, OFFSETS, 3).tolist() == [1.0, 0.5, 0.0]


def test_ndcg_by_hand() -> None:
    at_2 = 1 / np.log2(3)
    expected = [at_2, 1 / (1 + at_2), 0.0]
    assert metrics.ndcg(RANKED, RELEVANT, OFFSETS, 3) == pytest.approx(expected)
    # At 1 the best list of two relevant items holds one of them.
    assert metrics.ndcg(RANKED, RELEVANT, OFFSETS, 1) == pytest.approx([0.0, 1.0, 0.0])


def test_nothing_is_never_a_hit_and_a_repeat_counts_once() -> None:
    ranked = np.array([[NOTHING, 0, 0, 0]], np.int32)
    assert metrics.recall(ranked, np.array([0], np.int32), np.array([0, 1]), 4).tolist() == [1.0]
    assert metrics.hits(ranked, np.array([0], np.int32), np.array([0, 1])).tolist() == [[False, True, False, False]]
    empty = np.full((1, 4), NOTHING, np.int32)
    assert metrics.recall(empty, np.array([0], np.int32), np.array([0, 1]), 4).tolist() == [0.0]


@given(st.data())
def test_recall_and_ndcg_against_a_dictionary_oracle(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 6))
    n_cases = data.draw(st.integers(1, 5))
    lists = [data.draw(st.lists(st.integers(-1, 9), min_size=k, max_size=k)) for _ in range(n_cases)]
    relevant = [data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5)) for _ in range(n_cases)]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in relevant])])
    flat = np.array([item for r in relevant for item in r], np.int32)
    ranked = np.array(lists, np.int32)
    for case in range(n_cases):
        left, gained = set(relevant[case]), 0.0
        for place, item in enumerate(lists[case], start=1):
            if item in left:
                left.remove(item)
                gained += 1 / np.log2(place + 1)
        wanted = len(set(relevant[case]))
        best = sum(1 / np.log2(place + 1) for place in range(1, min(wanted, k) + 1))
        assert metrics.recall(ranked, flat, offsets, k)[case] == pytest.approx(1 - len(left) / wanted)
        assert metrics.ndcg(ranked, flat, offsets, k)[case] == pytest.approx(gained / best)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="3 ranked lists, but offsets for 2 cases"):
        metrics.hits(RANKED, RELEVANT, OFFSETS[:-1])
    with pytest.raises(InvalidInputError, match="case 1 has no relevant item"):
        metrics.hits(RANKED, RELEVANT[:2], np.array([0, 1, 1, 2]))
    with pytest.raises(InvalidInputError, match="metric at 10 asked of lists of 3"):
        metrics.recall(RANKED, RELEVANT, OFFSETS, 10)


def test_interval_holds_the_mean_and_shrinks_with_cases() -> None:
    few, many = np.repeat([0.0, 1.0], [90, 10]), np.repeat([0.0, 1.0], [9000, 1000])
    wide, narrow = metrics.mean_with_interval(few, seed=0), metrics.mean_with_interval(many, seed=0)
    assert wide.value == narrow.value == pytest.approx(0.1)
    assert wide.unit == "share"
    assert wide.spread is not None
    assert narrow.spread is not None
    # The binomial standard error is .03 and .003; 95 % is about two of them to each side.
    assert wide.spread == pytest.approx((0.1 - 0.0588, 0.1 + 0.0588), abs=0.011)
    assert narrow.spread == pytest.approx((0.1 - 0.00588, 0.1 + 0.00588), abs=0.0011)
    assert metrics.mean_with_interval(few, seed=0) == wide


def test_interval_of_equal_values_is_a_point_and_of_none_an_error() -> None:
    assert metrics.mean_with_interval(np.full(7, 0.25), seed=1).spread == (0.25, 0.25)
    with pytest.raises(InvalidInputError, match="no case"):
        metrics.mean_with_interval(np.empty(0), seed=0)


def test_a_row_of_the_table() -> None:
    row = metrics.recall_and_ndcg(RANKED, RELEVANT, OFFSETS, seed=0, cutoffs=(1, 3))
    assert list(row) == ["recall1", "ndcg1", "recall3", "ndcg3"]
    assert row["recall3"].value == pytest.approx(0.5)


def test_sid_level_counts_an_item_of_the_same_sid() -> None:
    groups = SidGroups.from_codes(np.array([[0, 1], [2, 2], [0, 1], [3, 0]], np.int32))
    assert groups.n_sids == 3
    assert groups.of_item[0] == groups.of_item[2] != groups.of_item[1]
    assert groups.collision_rate() == 0.5
    ranked, relevant, offsets = np.array([[1, 0, 3]], np.int32), np.array([2], np.int32), np.array([0, 1])
    assert metrics.recall(ranked, relevant, offsets, 2).tolist() == [0.0]
    assert metrics.recall(groups.ranked(ranked), groups.relevant(relevant), offsets, 2).tolist() == [1.0]


def test_sid_lists_hold_each_sid_once_in_order_of_first_appearance() -> None:
    groups = SidGroups(np.array([5, 6, 5, 7], np.int32), 8)
    ranked = np.array([[0, 2, 1, 0, 3], [NOTHING, 2, NOTHING, 0, 1]], np.int32)
    assert groups.ranked(ranked).tolist() == [[5, 6, 7, NOTHING, NOTHING], [5, 6, NOTHING, NOTHING, NOTHING]]


def test_coverage_and_unfilled_rate() -> None:
    assert metrics.catalogue_coverage(RANKED, 10, 1) == pytest.approx(0.3)
    assert metrics.catalogue_coverage(RANKED, 10, 3) == pytest.approx(0.8)
    assert metrics.unfilled_rate(RANKED, 3) == pytest.approx(1 / 9)
    assert metrics.unfilled_rate(RANKED, 2) == 0.0


def test_gini_by_hand() -> None:
    equal = np.array([[0], [1], [2], [3]], np.int32)
    assert metrics.exposure_gini(equal, 4, 1) == pytest.approx(0.0)
    assert metrics.exposure_gini(np.zeros((5, 1), np.int32), 4, 1) == pytest.approx(0.75)  # (n - 1) / n
    with pytest.raises(InvalidInputError, match="no list holds an item"):
        metrics.exposure_gini(np.full((2, 1), NOTHING, np.int32), 4, 1)


def test_invalid_rate() -> None:
    catalogue = np.array([[0, 1], [2, 3]], np.int32)
    generated = np.array([[[0, 1], [2, 3]], [[0, 3], [2, 3]]], np.int32)
    assert metrics.invalid_rate(generated, catalogue) == 0.25


def test_long_tail_keeps_equal_counts_together() -> None:
    # 20 interactions: 20 % is 4. The ones make 3, the next level (2) would make 5.
    counts = np.array([0, 1, 1, 1, 2, 15])
    assert metrics.long_tail(counts).tolist() == [False, True, True, True, False, False]
    assert metrics.long_tail(counts, share=0.25).tolist() == [False, True, True, True, True, False]
    assert not metrics.long_tail(np.zeros(3, np.int64)).any()


def test_cohorts_are_disjoint_and_cover_all_cases() -> None:
    counts = np.array([0, 1, 1, 1, 2, 15])
    relevant, offsets = np.array([0, 2, 5, 0, 4], np.int32), np.array([0, 1, 2, 3, 5])
    masks = metrics.cohorts(relevant, offsets, counts)
    assert masks["cold"].tolist() == [True, False, False, False]
    assert masks["long_tail"].tolist() == [False, True, False, False]
    assert masks["head"].tolist() == [
        False,
        False,
        True,
        True,
    ]  # the last case goes by item 4, not by cold item 0


def test_popularity_buckets() -> None:
    counts = np.array([0, 1, 4, 5, 99, 100, 5000])
    relevant = np.arange(7, dtype=np.int32)
    masks = metrics.popularity_buckets(relevant, np.arange(8), counts)
    assert list(masks) == ["0", "1-4", "5-9", "10-19", "20-49", "50-99", "100+"]
    assert [int(mask.sum()) for mask in masks.values()] == [1, 2, 1, 0, 0, 1, 2]
