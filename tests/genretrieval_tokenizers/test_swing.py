from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.errors import DataError
from genretrieval_tokenizers.swing import swing_pairs

# Items 0 and 1 were taken together by three users; item 2 by two users who share nothing else.
SEQUENCES = [np.array(items, np.int32) for items in ([0, 1], [2, 1, 0, 1], [1, 0], [2])]


def test_scores_by_hand() -> None:
    # Users 0 and 2 (two items each) share two items: 1/sqrt(2) * 1/sqrt(2) / (1 + 2) = 1/6 = 0.16667. User 1 has three
    # items and shares two with either: 1/sqrt(6) / 3 = 0.13608, twice. Together 0.43883. Item 2 is in no shared pair.
    swing = swing_pairs(SEQUENCES, n_items=4)
    assert swing.pairs.tolist() == [[0, 1], [1, 0]]
    assert swing.scores == pytest.approx([0.43883, 0.43883], abs=1e-5)


def test_of_too_many_users_those_with_few_items_stay() -> None:
    # Items 0 and 1 keep users 0 and 2: 1/6.
    swing = swing_pairs(SEQUENCES, n_items=4, max_users_per_item=2)
    assert swing.scores == pytest.approx([1 / 6, 1 / 6])


@given(
    histories=st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=6),
    alpha=st.sampled_from([0.5, 1, 3]),
)
def test_scores_agree_with_the_definition(histories: list[list[int]], alpha: float) -> None:
    oracle: dict[tuple[int, int], float] = {}
    for u, v in combinations([set(history) for history in histories], 2):
        for i in u & v:
            for j in u & v - {i}:
                added = 1 / (len(u) * len(v)) ** 0.5 / (alpha + len(u & v))
                oracle[i, j] = oracle.get((i, j), 0) + added
    swing = swing_pairs([np.array(history, np.int32) for history in histories], 6, alpha=alpha)
    assert {(i, j): s for (i, j), s in zip(swing.pairs.tolist(), swing.scores.tolist(), strict=True)} == pytest.approx(
        oracle
    )


def test_the_best_targets_come_first_and_ties_go_to_the_lower_item() -> None:
    # Three users take 0 and 3, two of them also 1 and 2, which therefore tie.
    sequences = [np.array(items) for items in ([0, 1, 2, 3], [0, 1, 2, 3], [0, 3])]
    swing = swing_pairs(sequences, 4, per_item=2)
    assert swing.pairs[swing.pairs[:, 0] == 0, 1].tolist() == [3, 1]
    assert np.bincount(swing.pairs[:, 0]).tolist() == [2, 2, 2, 2]


def test_users_far_apart_in_the_log_are_paired() -> None:
    one_item = [np.array([item % 5]) for item in range(5000)]
    swing = swing_pairs([np.array([5, 6]), *one_item, np.array([6, 5])], 7, max_users_per_item=10)
    assert swing.pairs.tolist() == [[5, 6], [6, 5]]


def test_no_users_make_no_pairs() -> None:
    assert swing_pairs([], 3).pairs.shape == (0, 2)
    assert swing_pairs([np.zeros(0, np.int32)], 3).scores.shape == (0,)


@pytest.mark.parametrize("row", [-1, 3])
def test_items_outside_the_catalogue_are_refused(row: int) -> None:
    with pytest.raises(DataError, match=rf"item row {row}, but there are 3 items"):
        swing_pairs([np.array([0, row])], 3)


@pytest.mark.parametrize("setting", [{"per_item": 0}, {"max_users_per_item": 1}, {"alpha": 0.0}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        swing_pairs(SEQUENCES, 4, **setting)  # type: ignore[arg-type]
