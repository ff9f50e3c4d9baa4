"""Turns by hand, and a queue that never loses count."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from genretrieval_serving.fair_queue import Entry, FairQueue


def filled(*waiting: tuple[str, int]) -> tuple[FairQueue[Entry], list[Entry]]:
    queue: FairQueue[Entry] = FairQueue()
    entries = [Entry(caller, rows) for caller, rows in waiting]
    for entry in entries:
        queue.add(entry)
    return queue, entries


def taken(queue: FairQueue[Entry]) -> str:
    order = ""
    while (entry := queue.take(100)) is not None:
        order += entry.caller
    return order


def test_a_flood_holds_up_another_caller_by_one_entry() -> None:
    queue, _ = filled(*[("a", 1)] * 5, ("b", 1))
    assert (queue.ahead("b"), queue.ahead("a"), queue.ahead("c")) == (3, 6, 2)
    assert taken(queue) == "abaaaa"


def test_a_turn_is_a_row() -> None:
    # a has one row three times, b three rows at once: while b has had its three, a has its three.
    queue, _ = filled(("a", 1), ("a", 1), ("a", 1), ("b", 3), ("b", 3), ("a", 1))
    assert taken(queue) == "abaaba"


def test_who_comes_back_does_not_come_first() -> None:
    queue, _ = filled(("a", 4), ("b", 1), ("b", 1))
    assert queue.take(9).caller == "a"
    queue.add(Entry("a", 1))
    assert queue.ahead("a") == 3
    assert taken(queue) == "bba"


def test_who_comes_late_owes_nothing_and_is_owed_nothing() -> None:
    queue, _ = filled(*[("a", 1)] * 6)
    for _ in range(3):
        queue.take(1)
    queue.add(Entry("b", 1))
    queue.add(Entry("b", 1))
    assert taken(queue) == "babaa"


def test_what_has_no_room_stays_and_what_leaves_makes_room() -> None:
    queue, (first, second, third) = filled(("a", 3), ("a", 1), ("b", 2))
    assert queue.take(2) is None
    assert queue.remove(first)
    assert not queue.remove(first)
    assert (len(queue), queue.rows, list(queue)) == (2, 3, [second, third])
    assert queue.take(2) is second
    assert queue.take(2) is third
    assert (queue.take(2), queue.rows, len(queue)) == (None, 0, 0)


CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 9)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("take"), st.integers(1, 9)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(CALLS)
def test_it_never_loses_count(calls: list[Any]) -> None:
    queue: FairQueue[Entry] = FairQueue()
    came: list[Entry] = []
    waiting: list[Entry] = []
    for what, *given_ in calls:
        if what == "add":
            came.append(Entry(*given_))
            queue.add(came[-1])
            waiting.append(came[-1])
        elif what == "remove" and given_[0] < len(came):
            entry = came[given_[0]]
            assert queue.remove(entry) == (entry in waiting)
            waiting = [e for e in waiting if e is not entry]
        elif what == "take":
            entry = queue.take(given_[0])
            if entry is not None:
                # The oldest of its caller, and nobody's that had left.
                assert entry is next(e for e in waiting if e.caller == entry.caller)
                waiting.remove(entry)
        assert sorted(map(id, queue)) == sorted(map(id, waiting))
        assert (len(queue), queue.rows) == (len(waiting), sum(e.rows for e in waiting))
        assert all(queue.ahead(caller) <= queue.rows for caller in "abcd")
    assert len(taken(queue)) == len(waiting)
    assert (queue.rows, len(queue), list(queue)) == (0, 0, [])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=60, max_size=60), st.lists(st.integers(1, 5), min_size=60, max_size=60))
def test_two_that_always_wait_get_as_many_rows(rows_a: list[int], rows_b: list[int]) -> None:
    queue, _ = filled(*[("a", n) for n in rows_a], *[("b", n) for n in rows_b])
    got = {"a": 0, "b": 0}
    while max(got.values()) < 55:
        entry = queue.take(9)
        got[entry.caller] += entry.rows
        assert abs(got["a"] - got["b"]) <= 2 * 5
