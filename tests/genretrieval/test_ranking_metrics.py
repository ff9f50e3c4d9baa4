from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genretrieval.errors import InvalidInputError
from genretrieval.ranking_metrics import auc, expected_calibration_error, grouped_auc


def flags(*labels: int) -> np.ndarray:
    return np.array(labels, np.bool_)


def test_auc_by_hand() -> None:
    # Positives 0.9 and 0.4, negatives 0.5 and 0.1: 0.9 beats both, 0.4 beats one. 3 of 4 pairs.
    assert auc(np.array([0.9, 0.4, 0.5, 0.1]), flags(1, 1, 0, 0)) == 0.75
    assert auc(np.array([1.0, 2.0]), flags(1, 0)) == 0.0


def test_a_tie_is_half_a_pair() -> None:
    assert auc(np.array([0.5, 0.5]), flags(1, 0)) == 0.5
    # Positives 2, 2, 1; negatives 2, 0: (1/2 + 1) + (1/2 + 1) + (0 + 1) = 4 of 6 pairs.
    assert auc(np.array([2.0, 2, 1, 2, 0]), flags(1, 1, 1, 0, 0)) == 4 / 6
    assert auc(np.array([-np.inf, np.inf, np.inf, -np.inf]), flags(0, 1, 0, 1)) == (1 / 2 + 1 + 0 + 1 / 2) / 4


def test_grouped_auc_by_hand() -> None:
    # Group 7: positive 1 above one of two negatives, 1/2, three impressions. Group 3: right, 1, two impressions.
    # Group 5 has no positive, group 1 no negative: left out. All in all (3 * 1/2 + 2 * 1) / 5.
    groups = np.array([7, 3, 5, 7, 1, 7, 3, 5])
    scores = np.array([1.0, 9.0, 4.0, 2.0, 0.0, 0.5, 8.0, 4.0])
    assert grouped_auc(scores, flags(1, 1, 0, 0, 1, 0, 0, 0), groups) == (3 * 0.5 + 2 * 1.0) / 5


def test_equal_scores_of_neighbouring_groups_are_no_tie() -> None:
    assert grouped_auc(np.array([0.0, 1.0, 1.0, 2.0]), flags(0, 1, 0, 1), np.array([0, 0, 1, 1])) == 1.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), min_size=1, max_size=30))
def test_grouped_auc_against_all_pairs(rows: list[tuple[int, bool, int]]) -> None:
    scores, labels, groups = (np.array(column) for column in zip(*rows, strict=True))
    total = weight = 0.0
    for group in range(3):
        here = groups == group
        wins = [
            (p > n) + 0.5 * (p == n) for p in scores[here & labels].tolist() for n in scores[here & ~labels].tolist()
        ]
        if wins:
            total, weight = total + here.sum() * np.mean(wins), weight + here.sum()
    if weight:
        assert grouped_auc(scores.astype(np.float32), labels, groups) == pytest.approx(total / weight, rel=1e-12)
    else:
        with pytest.raises(InvalidInputError, match="both labels"):
            grouped_auc(scores.astype(np.float32), labels, groups)


def test_calibration_error_by_hand() -> None:
    # Two bins of two: |0.5 - 0.2| and |1 - 0.7|, a half each.
    probabilities = np.array([0.8, 0.1, 0.3, 0.6])
    assert expected_calibration_error(probabilities, flags(1, 0, 1, 1), 2) == pytest.approx(0.3)
    # One bin: |3/4 - 0.45|. More bins than impressions: |p - y| of each.
    assert expected_calibration_error(probabilities, flags(1, 0, 1, 1), 1) == pytest.approx(0.3)
    assert expected_calibration_error(probabilities, flags(1, 0, 1, 1), 9) == pytest.approx((0.2 + 0.1 + 0.7 + 0.4) / 4)


def test_bins_hold_equal_numbers_and_not_equal_widths() -> None:
    # In tenths of [0, 1] these would share one bin, in which errors of 0.01 and -0.01 cancel.
    probabilities = np.repeat([0.01, 0.03], 100)
    labels = np.concatenate([np.arange(100) < 2, np.arange(100) < 2])
    assert expected_calibration_error(probabilities, labels, 2) == pytest.approx(0.01)
    assert expected_calibration_error(probabilities, labels, 1) == pytest.approx(0)


@settings(deadline=None, max_examples=20)
@given(st.permutations([0, 0, 1, 1, 1, 0, 1]))
def test_the_order_of_equal_probabilities_changes_nothing(labels: list[int]) -> None:
    half = np.full(7, 0.5)
    assert expected_calibration_error(half, flags(*labels), 3) == pytest.approx(4 / 7 - 0.5)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="both labels"):
        auc(np.array([0.1, 0.2]), flags(1, 1))
    with pytest.raises(InvalidInputError, match="both labels"):
        auc(np.empty(0), flags())
    with pytest.raises(InvalidInputError, match="one length"):
        auc(np.array([0.1]), flags(1, 0))
    with pytest.raises(InvalidInputError, match="not a number"):
        auc(np.array([0.1, np.nan]), flags(1, 0))
    with pytest.raises(InvalidInputError, match="at least one"):
        expected_calibration_error(np.empty(0), flags())
    with pytest.raises(InvalidInputError, match=r"\[0, 1\]"):
        expected_calibration_error(np.array([1.5]), flags(1))
