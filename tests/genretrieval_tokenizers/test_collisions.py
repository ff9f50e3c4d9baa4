from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes, SemanticIds
from genretrieval_tokenizers.collisions import CollisionConfig, append_codes, number_duplicates, resolve, row_keys

NONE, DEDUP, REASSIGN = (CollisionConfig(method=method) for method in ("none", "dedup", "reassign"))


def codes(*rows: tuple[int, ...]) -> Codes:
    return np.array(rows, np.int32)


def price(table: list[list[float]]) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """Costs of items, a row each."""
    return lambda rows: np.array(table, np.float32)[rows]


# --- the number of a row


@given(hnp.arrays(np.int32, st.tuples(st.integers(0, 9), st.integers(1, 4)), elements=st.integers(0, 3)))
def test_keys_are_equal_and_ordered_as_rows_are(rows: np.ndarray) -> None:
    keys = row_keys(rows).tolist()
    tuples = [tuple(row) for row in rows.tolist()]
    for key, row in zip(keys, tuples, strict=True):
        assert [key < other for other in keys] == [row < other for other in tuples]


def test_keys_of_codebooks_too_large_for_one_integer() -> None:
    big = 2**31 - 1
    rows = codes((big, big, big), (big, big, 0), (0, big, big), (big, big, big))
    keys = row_keys(rows)
    assert keys[0] == keys[3]
    assert keys[2] < keys[1] < keys[0]


# --- dedup


def test_dedup_numbers_items_of_a_tuple_in_row_order() -> None:
    out = resolve(codes((0, 1), (2, 2), (0, 1), (0, 0), (0, 1)), (3, 3), CollisionConfig(headroom=2))
    assert out.ids.codes.tolist() == [[0, 1, 0], [2, 2, 0], [0, 1, 1], [0, 0, 0], [0, 1, 2]]
    assert out.ids.codebook_sizes == (3, 3, 3 + 2)
    assert (out.moved, out.added_cost) == (0, 0)


@given(
    hnp.arrays(np.int32, st.tuples(st.integers(0, 12), st.just(2)), elements=st.integers(0, 1)),
    st.integers(0, 12),
)
def test_numbering_in_two_steps_is_numbering_at_once(rows: np.ndarray, split: int) -> None:
    split = min(split, len(rows))
    at_once = number_duplicates(rows)
    seen: dict[tuple[int, ...], int] = {}
    for row, number in zip(rows.tolist(), at_once.tolist(), strict=True):
        assert number == seen.get(tuple(row), 0)
        seen[tuple(row)] = number + 1
    published = np.column_stack([rows[:split], at_once[:split]])
    assert number_duplicates(rows[split:], published).tolist() == at_once[split:].tolist()


def test_the_number_of_a_deleted_item_is_not_given_again() -> None:
    published = codes((5, 0), (5, 2))  # (5, 1) was deleted
    assert number_duplicates(codes((5,), (6,)), published).tolist() == [3, 0]


def test_dedup_refuses_an_item_without_a_number_left_and_says_the_price() -> None:
    published = resolve(codes((1, 1)), (2, 2), CollisionConfig(headroom=1)).ids
    with pytest.raises(DataError, match=r"1 of 3 new items.*row 2 with codes \(1, 1\).*larger headroom.*re-keys every"):
        append_codes(published, codes((0, 0), (1, 1), (1, 1)), DEDUP)


# --- none


def test_none_keeps_the_codes_and_counts_what_a_cap_hides() -> None:
    rows = codes((0, 0), (0, 0), (1, 1), (0, 0), (1, 1))
    assert resolve(rows, (2, 2), NONE).ids.codes.tolist() == rows.tolist()
    assert resolve(rows, (2, 2), NONE).notes == ()
    assert resolve(rows, (2, 2), CollisionConfig("none", cap=3)).notes == ()
    # With one listed: two of the three and one of the two are hidden.
    (note,) = resolve(rows, (2, 2), CollisionConfig("none", cap=1)).notes
    assert note.startswith("3 of 5 items are listed only where others of their SID are excluded: 2 SIDs")


# --- reassign


def test_reassigning_three_items_by_hand() -> None:
    # Items 0 and 1 both want code 0 under prefix 4; item 2 is alone under prefix 5. Moving item 0 costs 9 - 1 = 8,
    # moving item 1 costs 3 - 2 = 1: item 1 moves, 1 / 3 an item.
    out = resolve(codes((4, 0), (4, 0), (5, 0)), (6, 2), REASSIGN, price([[1, 9], [2, 3], [0, 7]]))
    assert out.ids.codes.tolist() == [[4, 0], [4, 1], [5, 0]]
    assert out.ids.codebook_sizes == (6, 2)
    assert out.moved == 1
    assert out.added_cost == pytest.approx(1 / 3)
    assert out.notes[0].startswith("reassigning moved the last code of 1 of 3 items")


def test_the_items_of_a_prefix_are_assigned_together() -> None:
    # Nearest codes cost 1 + 1 + 1. One after the other, item 0 keeps code 0, and item 1 pays 10 for code 2: 12 in all.
    # Together, item 1 keeps code 0 (1), item 0 goes to 1 (2), and item 2, though it did not collide, to 2 (3): 6.
    out = resolve(codes((0, 0), (0, 0), (0, 1)), (1, 3), REASSIGN, price([[1, 2, 10], [1, 10, 10], [10, 1, 3]]))
    assert out.ids.codes[:, -1].tolist() == [1, 0, 2]
    assert out.moved == 2
    assert out.added_cost == pytest.approx((6 - 3) / 3)


@given(
    hnp.arrays(np.float32, (6, 4), elements=st.integers(0, 99).map(float)),
    hnp.arrays(np.int32, (6,), elements=st.integers(0, 1)),
)
def test_reassignment_is_the_cheapest_of_all_permutations(cost: np.ndarray, prefix: np.ndarray) -> None:
    if max(np.bincount(prefix)) > 4:
        return
    nearest = cost.argmin(axis=1)
    out = resolve(np.column_stack([prefix, nearest]).astype(np.int32), (2, 4), REASSIGN, lambda rows: cost[rows])
    assert len({tuple(row) for row in out.ids.codes.tolist()}) == 6
    assert out.ids.codes[:, 0].tolist() == prefix.tolist()
    cheapest = sum(
        min(cost[items, list(chosen)].sum() for chosen in permutations(range(4), len(items)))
        for items in (np.flatnonzero(prefix == value) for value in (0, 1))
    )
    assert out.added_cost == pytest.approx((cheapest - cost.min(axis=1).sum()) / 6, abs=1e-6)


def test_prefixes_without_a_collision_are_not_even_priced() -> None:
    asked: list[int] = []

    def costs(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        asked.extend(rows.tolist())
        return np.tile(np.float32([0, 1, 2]), (len(rows), 1))

    rows = codes((0, 0), (1, 2), (2, 1), (1, 2), (0, 1), (1, 0))
    out = resolve(rows, (3, 3), REASSIGN, costs)
    assert sorted(asked) == [1, 3, 5]
    assert out.ids.codes[[0, 2, 4]].tolist() == rows[[0, 2, 4]].tolist()


def test_many_prefixes_are_priced_in_batches_and_all_become_unique() -> None:
    rng = np.random.default_rng(0)
    rows = np.column_stack([np.repeat(np.arange(3000), 4), rng.integers(0, 8, 12_000)]).astype(np.int32)
    cost = rng.random((12_000, 8)).astype(np.float32)
    calls: list[int] = []

    def costs(wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        calls.append(len(wanted))
        return cost[wanted]

    out = resolve(rows, (3000, 8), REASSIGN, costs)
    assert len(np.unique(row_keys(out.ids.codes))) == 12_000
    assert len(calls) < 6


def test_row_order_changes_no_reassigned_id() -> None:
    rng = np.random.default_rng(1)
    cost = rng.random((60, 32)).astype(np.float32)
    rows = np.column_stack([rng.integers(0, 3, 60), cost.argmin(axis=1)]).astype(np.int32)
    shuffled = rng.permutation(60)
    out = resolve(rows, (3, 32), REASSIGN, lambda wanted: cost[wanted])
    again = resolve(rows[shuffled], (3, 32), REASSIGN, lambda wanted: cost[shuffled][wanted])
    assert again.ids.codes.tolist() == out.ids.codes[shuffled].tolist()


def test_a_code_that_does_not_exist_is_never_given() -> None:
    # Code 1 would be cheapest for either, but there is no such code under this prefix.
    inf = np.inf
    out = resolve(codes((0, 0), (0, 0)), (1, 3), REASSIGN, price([[0, inf, 5], [0, inf, 4]]))
    assert out.ids.codes[:, -1].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("table", "n_codes", "match"),
    [
        ([[0.0, 1.0]] * 3, 2, r"3 items .*\(7,\).*has 2 codes.*dedup.*larger last level.*where their vectors differ"),
        ([[0.0, 1.0, np.inf]] * 3, 3, r"3 items share the codes \(7,\).*has 2 codes"),
    ],
)
def test_a_prefix_with_more_items_than_codes_is_refused(table: list[list[float]], n_codes: int, match: str) -> None:
    with pytest.raises(DataError, match=match):
        resolve(codes((7, 0), (7, 0), (7, 0)), (8, n_codes), REASSIGN, price(table))


def test_alike_items_are_spread_over_the_codes_of_one_level() -> None:
    out = resolve(codes((0,), (0,), (0,)), (3,), REASSIGN, price([[0, 1, 2]] * 3))
    assert sorted(out.ids.codes[:, 0].tolist()) == [0, 1, 2]


# --- appending


def test_reassign_appends_at_the_cheapest_free_code_in_row_order() -> None:
    # Under prefix 0 code 1 is published. New item 0 has its own code 2 to itself. Item 1 wants the published code 1;
    # of the free ones, 0 and 3, it takes 3. Item 2 wants 3, which item 1 now has, and is left with 0.
    published = SemanticIds(codes((0, 1), (1, 1)), (2, 4))
    out = append_codes(
        published, codes((0, 2), (0, 1), (0, 3)), REASSIGN, price([[9, 9, 0, 9], [5, 0, 1, 2], [7, 6, 5, 1]])
    )
    assert out.ids.codes.tolist() == [[0, 1], [1, 1], [0, 2], [0, 3], [0, 0]]
    assert out.moved == 2
    assert out.added_cost == pytest.approx(((2 - 0) + (7 - 1)) / 3)


@pytest.mark.parametrize("config", [NONE, DEDUP, REASSIGN])
@pytest.mark.parametrize("split", [0, 5, 30])
def test_published_ids_never_move_and_one_by_one_is_at_once(config: CollisionConfig, split: int) -> None:
    rng = np.random.default_rng(2)
    cost = rng.random((30, 16)).astype(np.float32)
    rows = np.column_stack([rng.integers(0, 3, 30), cost.argmin(axis=1)]).astype(np.int32)
    published = resolve(rows[:split], (3, 16), config, lambda wanted: cost[:split][wanted]).ids
    at_once = append_codes(published, rows[split:], config, lambda wanted: cost[split:][wanted]).ids
    step = published
    for row in range(split, 30):
        step = append_codes(step, rows[row : row + 1], config, lambda wanted, row=row: cost[row + wanted]).ids
    assert np.array_equal(at_once.codes[:split], published.codes)
    assert at_once.codebook_sizes == published.codebook_sizes
    assert np.array_equal(step.codes, at_once.codes)
    if config is not NONE:
        assert len(np.unique(row_keys(at_once.codes))) == 30


def test_reassign_refuses_an_item_when_its_prefix_is_full() -> None:
    published = SemanticIds(codes((0, 0), (0, 1)), (2, 2))
    with pytest.raises(DataError, match=r"1 of 2 new items.*first new row 1.*nothing was appended.*larger last level"):
        append_codes(published, codes((1, 0), (0, 1)), REASSIGN, price([[0, 1], [1, 0]]))
    with pytest.raises(DataError, match="1 of 1 new items"):
        append_codes(SemanticIds(codes((0, 0)), (1, 2)), codes((0, 0)), REASSIGN, price([[0, np.inf]]))


@pytest.mark.parametrize("config", [NONE, DEDUP, REASSIGN])
def test_codes_of_another_tokenizer_are_refused(config: CollisionConfig) -> None:
    published = resolve(codes((1, 1)), (2, 2), config, price([[1, 0]])).ids
    with pytest.raises(DataError, match="not from one tokenizer"):
        append_codes(published, codes((0, 0, 0)), config, price([[1, 0]]))
    with pytest.raises(DataError, match="another tokenizer"):
        append_codes(published, codes((0, 7)), config, price([[1, 0]]))


@pytest.mark.parametrize("config", [NONE, DEDUP, REASSIGN])
def test_no_items_and_one_item(config: CollisionConfig) -> None:
    empty = np.zeros((0, 2), np.int32)
    assert resolve(empty, (2, 2), config, price([[1, 0]])).ids.n_items == 0
    one = resolve(codes((1, 1)), (2, 2), config, price([[1, 0]])).ids
    assert one.codes[0, :2].tolist() == [1, 1]
    assert np.array_equal(append_codes(one, empty, config, price([[1, 0]])).ids.codes, one.codes)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"method": "drop"}, "choose none, dedup or reassign"),
        ({"headroom": -1}, "0 or more"),
        ({"headroom": 3_000_000_000}, "headroom is 3000000000.*at most 65536"),
        ({"method": "none", "cap": 0}, "at least 1"),
        ({"method": "reassign", "headroom": 4}, "'reassign' has not"),
        ({"method": "none", "headroom": 4}, "'none' has not"),
        ({"method": "dedup", "cap": 3}, "lets none be shared"),
        ({"method": "reassign", "cap": 3}, "lets none be shared"),
    ],
)
def test_settings_out_of_range_or_ignored_are_refused(setting: dict[str, object], match: str) -> None:
    with pytest.raises(DataError, match=match):
        CollisionConfig(**setting)  # type: ignore[arg-type]
