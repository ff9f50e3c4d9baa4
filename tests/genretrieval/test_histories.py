from __future__ import annotations

import numpy as np
import pytest

from genretrieval.histories import NO_QUERY, NO_TIME, Histories, LeaveOneOut


def histories(*users: list[int]) -> Histories:
    items = np.array([item for user in users for item in user], np.int32)
    n = len(items)
    return Histories(
        user_ids=[f"u{i}" for i in range(len(users))],
        offsets=np.cumsum([0, *map(len, users)]).astype(np.int64),
        items=items,
        events=np.zeros(n, np.int16),
        times=np.full(n, NO_TIME, np.int64),
        query_rows=np.full(n, NO_QUERY, np.int32),
        event_names=("click",),
        queries=[],
        order_rule="by hand",
    )


# Users of 4, 2, 3 and 1 interactions; flat positions 0-3, 4-5, 6-8, 9.
FOUR = histories([5, 6, 7, 8], [1, 2], [3, 4, 3], [9])


def test_lengths_and_users() -> None:
    assert FOUR.n_users == 4
    assert FOUR.lengths().tolist() == [4, 2, 3, 1]


def test_repeat_rate_counts_items_a_user_had_before() -> None:
    assert FOUR.repeat_rate() == pytest.approx(1 / 10)
    assert histories([1, 1, 1], [1]).repeat_rate() == pytest.approx(2 / 4)
    assert histories().repeat_rate() == 0.0


def test_leave_one_out_by_hand() -> None:
    split = LeaveOneOut(FOUR)
    assert split.train_ends().tolist() == [2, 6, 7, 10]
    assert np.flatnonzero(split.trained()).tolist() == [0, 1, 4, 5, 6, 9]
    users, positions = split.targets("test")
    assert (users.tolist(), positions.tolist()) == ([0, 2], [3, 8])
    users, positions = split.targets("validation")
    assert (users.tolist(), positions.tolist()) == ([0, 2], [2, 7])
    assert [s.tolist() for s in split.train_sequences()] == [[5, 6], [1, 2], [3], [9]]


def test_a_target_is_never_trained_on() -> None:
    split = LeaveOneOut(FOUR)
    for name in ("validation", "test"):
        users, positions = split.targets(name)
        assert (positions >= split.train_ends()[users]).all()
