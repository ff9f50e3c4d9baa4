from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genretrieval.errors import InvalidInputError
from genretrieval.features import RequestFeatures
from genretrieval.histories import Exposures, Histories, LeaveOneOut
from genretrieval.training.data import HistoryDataset, LengthBatchSampler, collate, cut_windows
from genretrieval_pipelines.queries import train_query_tokenizer


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), max_size=8), st.integers(1, 12))
def test_every_training_interaction_is_learnt_once(users: list[tuple[int, int]], max_history: int) -> None:
    lengths = np.array([length for length, _ in users], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    held_out = np.minimum(lengths, np.array([held for _, held in users], np.int64))
    train_ends = offsets[1:] - held_out
    windows = cut_windows(offsets, train_ends, max_history)
    learnt = np.zeros(offsets[-1], int)
    for user, start, end, learn_from in zip(
        windows.users, windows.starts, windows.ends, windows.learn_from, strict=True
    ):
        assert offsets[user] <= start <= learn_from < end <= train_ends[user]
        # The last target of a window reads no more than the model does.
        assert end - start - 1 <= max_history
        # Past a user's first window, what is learnt has half the context at least.
        assert start == offsets[user] or learn_from - start >= max_history // 5
        learnt[learn_from:end] += 1
    expected = np.zeros(offsets[-1], int)
    for begin, end in zip(offsets[:-1], train_ends, strict=True):
        expected[begin:end] = 1
    assert learnt.tolist() == expected.tolist()


def test_windows_by_hand() -> None:
    windows = cut_windows(np.array([0, 3, 17]), np.array([1, 17]), 5)
    assert windows.users.tolist() == [0, 1, 1, 1]
    assert windows.starts.tolist() == [0, 3, 7, 11]
    assert windows.ends.tolist() == [1, 9, 13, 17]
    assert windows.learn_from.tolist() == [0, 3, 9, 13]
    assert windows.lengths.tolist() == [1, 6, 6, 6]
    assert len(windows) == 4


@pytest.mark.parametrize("max_history", [0, -1])
def test_windows_that_would_never_advance_are_refused(max_history: int) -> None:
    with pytest.raises(InvalidInputError, match=f"max_history is {max_history}"):
        cut_windows(np.array([0, 3]), np.array([3]), max_history)


@pytest.fixture(scope="module")
def features() -> RequestFeatures:
    tokenizer = train_query_tokenizer(["red blue"] * 3, 50)
    return RequestFeatures(events=("purchase",), query_tokenizer=tokenizer.to_str(), max_query_tokens=4)


@pytest.fixture(scope="module")
def dataset(make_histories: Any, make_ids: Any, features: RequestFeatures) -> HistoryDataset:
    histories: Histories = make_histories()
    windows = cut_windows(histories.offsets, LeaveOneOut(histories).train_ends(), 8)
    profiles = np.arange(2 * histories.n_users).reshape(-1, 2)
    return HistoryDataset(histories, windows, make_ids(30), features, profiles)


def test_a_window_is_what_the_history_holds(dataset: HistoryDataset, features: RequestFeatures) -> None:
    assert len(dataset) == len(dataset.windows)
    histories = dataset.histories
    for row in range(len(dataset)):
        entry = dataset[row]
        start, end = dataset.windows.starts[row], dataset.windows.ends[row]
        assert entry["items"].tolist() == histories.items[start:end].tolist()
        assert entry["codes"].tolist() == dataset.ids.codes[histories.items[start:end]].tolist()
        # "click" was not among the behaviours of the model, "purchase" is its only one.
        assert entry["events"].tolist() == histories.events[start:end].tolist()
        assert entry["gaps"].tolist() == features.gap_buckets(histories.times[start:end]).tolist()
        assert entry["gaps"][0] == 0
        assert entry["learn"].sum() == end - dataset.windows.learn_from[row]
        assert entry["profile"].tolist() == dataset.profiles[dataset.windows.users[row]].tolist()
        for target, tokens in zip(entry["query_targets"], entry["query_tokens"], strict=True):
            query = histories.queries[histories.query_rows[start + target]]
            assert entry["learn"][target]
            assert tokens[tokens != 0].tolist() == features.query_tokens(query).tolist()
    asked = sum(len(dataset[row]["query_targets"]) for row in range(len(dataset)))
    ends = LeaveOneOut(histories).train_ends()
    trained = np.concatenate([np.arange(a, b) for a, b in zip(histories.offsets[:-1], ends, strict=True)])
    # Query 2, "?!", has no words: it trains as if it had not been there.
    assert asked == np.isin(histories.query_rows[trained], [0, 1]).sum() > 0


def test_a_batch_is_padded_on_the_right(dataset: HistoryDataset) -> None:
    entries = [dataset[row] for row in range(len(dataset))]
    entries = [entries[0], *sorted(entries, key=lambda e: len(e["items"]))[:: len(entries) // 4]]
    batch = collate(entries)
    n, longest = len(entries), max(len(entry["items"]) for entry in entries)
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes["target_items"] == shapes["learn"] == (n, longest)
    assert shapes["target_codes"] == (n, longest, 3)
    assert shapes["history_codes"] == (n, longest - 1, 3)
    assert shapes["history_events"] == shapes["history_gaps"] == shapes["history_mask"] == (n, longest - 1)
    assert shapes["profile"] == (n, 2)
    n_queries = sum(len(entry["query_targets"]) for entry in entries)
    assert shapes["query_rows"] == (n_queries,)
    assert shapes["query_tokens"] == shapes["query_mask"] == (n_queries, batch["query_tokens"].shape[1])
    assert {t.dtype for name, t in batch.items() if name not in ("learn", "history_mask", "query_mask")} == {
        torch.int64
    }
    at = 0
    for row, entry in enumerate(entries):
        size = len(entry["items"])
        assert batch["target_items"][row, :size].tolist() == entry["items"].tolist()
        assert batch["target_codes"][row, :size].tolist() == entry["codes"].tolist()
        assert batch["learn"][row].tolist() == [*entry["learn"].tolist(), *[False] * (longest - size)]
        assert batch["history_mask"][row].sum() == min(size, longest - 1)
        assert batch["history_gaps"][row, : size - 1].tolist() == entry["gaps"][: longest - 1][: size - 1].tolist()
        for target, tokens in zip(entry["query_targets"], entry["query_tokens"], strict=True):
            assert batch["query_rows"][at] == row * longest + target
            found = batch["query_tokens"][at]
            assert found[batch["query_mask"][at]].tolist() == tokens[tokens != 0].tolist()
            at += 1


def test_a_batch_without_queries_or_profile(make_histories: Any, make_ids: Any) -> None:
    histories = make_histories(n_users=4, max_length=1)
    windows = cut_windows(histories.offsets, histories.offsets[1:], 8)
    dataset = HistoryDataset(histories, windows, make_ids(30), RequestFeatures(), np.zeros((4, 0), np.int64))
    batch = collate([dataset[row] for row in range(4)])
    assert batch["history_codes"].shape == (4, 0, 3)
    assert batch["query_rows"].shape == (0,)
    assert batch["query_tokens"].shape == (0, 1)
    assert batch["profile"].shape == (4, 0)


LENGTHS = np.random.default_rng(0).integers(1, 30, 200)


def test_every_window_is_in_one_batch_of_an_epoch() -> None:
    sampler = LengthBatchSampler(LENGTHS, 64, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(200))
        for batch in batches:
            assert len(batch) * LENGTHS[batch].max() <= 64
        # Rows of a batch are alike: little of it is padding.
        assert sum(LENGTHS[batch].sum() for batch in batches) > 0.8 * sum(len(b) * LENGTHS[b].max() for b in batches)


def test_the_order_is_that_of_the_seed_and_the_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBatchSampler(LENGTHS, 64, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert {frozenset(batch) for batch in order(0, 1)} != {frozenset(batch) for batch in order(0, 2)}


@pytest.mark.parametrize("multiple", [2, 3, 8, 31])
def test_an_epoch_is_a_multiple_of_the_batches_of_a_step(multiple: int) -> None:
    plain, sampler = LengthBatchSampler(LENGTHS, 64, seed=3), LengthBatchSampler(LENGTHS, 64, 3, multiple=multiple)
    batches = list(sampler)
    assert len(batches) == len(sampler) == -(-len(plain) // multiple) * multiple
    assert sorted(row for batch in batches for row in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) * LENGTHS[batch].max() <= 64 for batch in batches)
    if len(sampler) == len(plain):
        assert batches == list(plain)


def test_more_batches_than_windows_cannot_be_made() -> None:
    assert sorted(LengthBatchSampler(np.array([1, 2, 3]), 64, 0, multiple=5)) == [[0], [1], [2]]


def test_a_window_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert sorted(map(sorted, LengthBatchSampler(np.array([9, 1, 1, 1]), 4, 0))) == [[0], [1, 2, 3]]


def test_the_past_of_a_window_by_hand(make_ids: Any) -> None:
    """One user: items 0 to 5 at times 10 to 60; shown 6 and 7 before the second one, and 8 with it."""
    histories = Histories(
        user_ids=["u"],
        offsets=np.array([0, 6]),
        items=np.arange(6, dtype=np.int32),
        events=np.array([0, 1, 0, 1, 0, 0], np.int16),
        times=np.arange(10, 70, 10),
        query_rows=np.full(6, -1, np.int32),
        event_names=("click", "purchase"),
        queries=[],
        order_rule="made up",
        scenario_rows=np.array([0, 1, -1, 1, 0, 1], np.int16),
        scenario_names=("home", "search"),
    )
    exposures = Exposures(np.array([0, 4]), np.array([6, 7, 8, 9], np.int32), np.array([5, 19, 20, 21]))
    features = RequestFeatures(events=("click", "purchase"), scenarios=("home", "search"))
    windows = cut_windows(histories.offsets, np.array([5]), 2)
    assert (windows.starts.tolist(), windows.ends.tolist()) == ([0, 2], [3, 5])
    ids = make_ids(10)

    def past(row: int, max_past: int) -> list[tuple[int, int]]:
        entry = HistoryDataset(
            histories, windows, ids, features, np.zeros((1, 0), np.int64), max_past=max_past, exposures=exposures
        )[row]
        assert entry["past_codes"].tolist() == ids.codes[entry["past_items"]].tolist()
        return list(zip(entry["past_items"].tolist(), entry["past_events"].tolist(), strict=True))

    # Click is behaviour 1, purchase 2, exposure 3; what happens at the very same time is not before.
    assert past(0, 9) == [(6, 3)]
    # Of equal times, interactions come first.
    assert past(1, 9) == [(6, 3), (0, 1), (7, 3), (1, 2), (8, 3), (9, 3)]
    assert past(1, 2) == [(8, 3), (9, 3)]
    dataset = HistoryDataset(histories, windows, ids, features, np.zeros((1, 0), np.int64), max_past=9)
    made = collate([dataset[row] for row in range(2)])
    assert made["past_items"][made["past_rows"]][1].tolist() == [0, 1]
    assert made["past_items"].tolist() == [0, 1]
    assert made["past_codes"].tolist() == ids.codes[:2].tolist()
    assert made["past_mask"].tolist() == [[False, False], [True, True]]
    assert made["target_scenarios"].tolist() == [[1, 2, 0], [0, 2, 1]]
    assert dataset.trained_items().tolist() == [0, 1, 2, 3, 4]
