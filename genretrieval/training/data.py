"""Training data of the generator: histories cut into windows, batched by length.

Everything is an index into flat arrays; a history is never copied before its batch is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from genretrieval.errors import InvalidInputError
from genretrieval.features import RequestFeatures
from genretrieval.histories import NO_QUERY, Exposures, Histories, past_before
from genretrieval.semantic_ids import SemanticIds


@dataclass(frozen=True, slots=True)
class Windows:
    """Stretches of histories that fit the model; window w is ``[starts[w], ends[w])`` of the flat arrays.

    Attributes:
        users: int64 ``[n]``, whose history it is; -1 for a query that stands alone.
        starts: int64 ``[n]``.
        ends: int64 ``[n]``.
        learn_from: int64 ``[n]``, first position whose prediction is trained: an interaction that an earlier window
            has trained is context only.
    """

    users: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    learn_from: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.starts)

    def of_users(self, first: int) -> Windows:
        """The windows of users from row `first` on."""
        return self.where(self.users >= first)

    def where(self, kept: NDArray[np.bool_]) -> Windows:
        """Those that a mask keeps."""
        return Windows(self.users[kept], self.starts[kept], self.ends[kept], self.learn_from[kept])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 ``[n]``: interactions of each window."""
        return self.ends - self.starts


def cut_windows(offsets: NDArray[np.int64], train_ends: NDArray[np.int64], max_history: int) -> Windows:
    """Cut every training history into windows of at most `max_history` + 1 interactions.

    A longer history becomes several windows that overlap by a fifth, so that every interaction is trained once and,
    past the first window, with at least ``max_history // 5`` interactions before it.

    Raises:
        InvalidInputError: `max_history` is below 1, and a window would never get past its own start.
    """
    if max_history < 1:
        raise InvalidInputError(f"max_history is {max_history}; a model reads at least 1 interaction")
    size, stride = max_history + 1, max_history - max_history // 5
    users, starts, ends, learn = [], [], [], []
    for user, (begin, end) in enumerate(zip(offsets[:-1].tolist(), train_ends.tolist(), strict=True)):
        start, done = begin, begin
        while done < end:
            stop = min(end, start + size)
            users.append(user)
            starts.append(start)
            ends.append(stop)
            learn.append(done)
            done, start = stop, stop + stride - size
    return Windows(*(np.asarray(column, np.int64) for column in (users, starts, ends, learn)))


class HistoryDataset(Dataset[dict[str, NDArray[np.int64]]]):
    """One entry a window: what the model reads and what it must write, as NumPy arrays."""

    def __init__(
        self,
        histories: Histories,
        windows: Windows,
        ids: SemanticIds,
        features: RequestFeatures,
        profiles: NDArray[np.int64],
        *,
        max_past: int = 0,
        exposures: Exposures | None = None,
        scenario: str | None = None,
    ) -> None:
        """Keep references.

        Args:
            histories: all interactions.
            windows: which stretches to train on.
            ids: semantic IDs of the catalogue.
            features: turns events, times and queries into model inputs.
            profiles: int64 ``[n_users, n_features]``, hashed profile features of each user; may have no columns.
            max_past: events before a window that the model reads; 0 for a model that reads the window alone.
            exposures: what users were shown, as part of that past.
            scenario: the only page or surface whose interactions are predicted; the others are context. None for all.
        """
        self.histories = histories
        self.windows = windows
        self.ids = ids
        self.profiles = profiles
        self.max_past = max_past
        self.exposures = exposures
        self.scenario_ids = np.zeros(len(histories.items), np.int64)
        if histories.scenario_rows is not None:
            known = np.asarray([features.scenario_id(name) for name in histories.scenario_names] + [0], np.int64)
            self.scenario_ids = known[histories.scenario_rows]
        self.predicted = np.ones(len(histories.items), bool)
        if scenario is not None:
            self.predicted = self.scenario_ids == features.scenario_id(scenario)
            before = np.concatenate([[0], np.cumsum(self.predicted)])
            self.windows = windows.where(before[windows.ends] > before[windows.learn_from])
        # One more entry, for the event -1 of a query that stands alone.
        self.event_ids = np.append(features.event_ids(histories.event_names), 0)
        self.gap_buckets = features.gap_buckets
        self.query_tokens = [features.query_tokens(query) for query in histories.queries]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    def trained_items(self) -> NDArray[np.int64]:
        """Item rows of every interaction in any window, sorted, each once."""
        starts, ends = self.windows.starts, self.windows.ends
        inside = np.zeros(len(self.histories.items) + 1, np.int64)
        np.add.at(inside, starts, 1)
        np.add.at(inside, ends, -1)
        return np.unique(self.histories.items[np.cumsum(inside[:-1]) > 0]).astype(np.int64)

    def __getitem__(self, row: int) -> dict[str, NDArray[np.int64]]:
        """Window `row`; see `collate` for the names."""
        h, w = self.histories, self.windows
        user, start, end, learn_from = (int(a[row]) for a in (w.users, w.starts, w.ends, w.learn_from))
        items = h.items[start:end]
        learnt = (np.arange(start, end) >= learn_from) & self.predicted[start:end]
        queries = np.where(learnt, h.query_rows[start:end], NO_QUERY)
        past = {}
        if self.max_past:
            first = int(h.offsets[user]) if user >= 0 else start
            before = past_before(h, self.exposures if user >= 0 else None, user, start, first, self.max_past)
            # Exposure is one behind the events of a history, as its id is.
            ids = np.append(self.event_ids[:-1], len(self.event_ids))
            codes = self.ids.codes[before.items].astype(np.int64)
            past = {"past_items": before.items, "past_codes": codes, "past_events": ids[before.events]}
        asked = [int(t) for t in np.flatnonzero(queries != NO_QUERY) if len(self.query_tokens[queries[t]])]
        return {
            "items": items.astype(np.int64),
            "codes": self.ids.codes[items].astype(np.int64),
            "events": self.event_ids[h.events[start:end]],
            "gaps": self.gap_buckets(h.times[start:end]),
            "learn": learnt,
            "profile": self.profiles[user],
            "query_targets": np.asarray(asked, np.int64),
            "query_tokens": _pad_rows([self.query_tokens[queries[t]] for t in asked]),
            "scenarios": self.scenario_ids[start:end],
            "positions": np.arange(start, end),
            **past,
        }


def _pad_rows(rows: list[NDArray[np.int64]], length: int = 0) -> NDArray[np.int64]:
    """Stack vectors of different lengths, zeros on the right."""
    out = np.zeros((len(rows), max([length, *map(len, rows)], default=0)), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def collate(entries: list[dict[str, NDArray[np.int64]]]) -> dict[str, Tensor]:
    """Pad windows to one batch, in the form that `Generator.decode_targets` takes.

    Returns:
        ``target_items`` int64 ``[B, T]``, ``target_codes`` int64 ``[B, T, L]``, ``learn`` bool ``[B, T]``;
        ``history_*`` of the first T - 1 interactions; where the events before them are read, ``past_events`` int64
        ``[B, N]``, ``past_mask``, and ``past_rows`` int64 ``[B, N]``: where each one's item stands in ``past_items``
        int64 ``[U]``, sorted, and ``past_codes`` int64 ``[U, L]``, as pasts are long and have few distinct items;
        ``target_scenarios`` int64 ``[B, T]``; ``target_positions`` int64 ``[B, T]``, places in the flat arrays of the
        histories; ``profile`` int64 ``[B, n_features]``; ``query_rows`` int64 ``[N]`` (flat ``b * T + t``),
        ``query_tokens`` int64 ``[N, Q]`` and ``query_mask`` bool ``[N, Q]`` of the targets that had a query. Token 0 is
        padding.
    """
    n_rows, length = len(entries), max(len(e["items"]) for e in entries)
    n_levels = entries[0]["codes"].shape[1]
    codes = np.zeros((n_rows, length, n_levels), np.int64)
    items, events, gaps = (np.zeros((n_rows, length), np.int64) for _ in range(3))
    learn, real = (np.zeros((n_rows, length), bool) for _ in range(2))
    for b, entry in enumerate(entries):
        n = len(entry["items"])
        items[b, :n], codes[b, :n], events[b, :n] = entry["items"], entry["codes"], entry["events"]
        gaps[b, :n], learn[b, :n], real[b, :n] = entry["gaps"], entry["learn"], True
    scenarios = _pad_rows([entry["scenarios"] for entry in entries])
    query_rows = np.concatenate([b * length + e["query_targets"] for b, e in enumerate(entries)])
    query_tokens = _pad_rows([row for e in entries for row in e["query_tokens"]], 1)
    arrays = {
        "target_items": items,
        "target_codes": codes,
        "learn": learn,
        "history_codes": codes[:, :-1],
        "history_events": events[:, :-1],
        "history_gaps": gaps[:, :-1],
        "history_mask": real[:, :-1],
        "profile": np.stack([e["profile"] for e in entries]),
        "query_rows": query_rows,
        "query_tokens": query_tokens,
        "query_mask": query_tokens != 0,
        "target_scenarios": scenarios,
        "target_positions": _pad_rows([entry["positions"] for entry in entries]),
    }
    if "past_items" in entries[0]:
        lengths = np.asarray([len(entry["past_items"]) for entry in entries])
        # Item 0 is added, so that row 0, which padding points to, exists even where nobody has a past.
        flat_items = np.concatenate([*(entry["past_items"] for entry in entries), [0]])
        flat_codes = np.concatenate([*(entry["past_codes"] for entry in entries), np.zeros((1, n_levels), np.int64)])
        arrays["past_items"], first, rows = np.unique(flat_items, return_index=True, return_inverse=True)
        arrays["past_codes"] = flat_codes[first]
        arrays["past_rows"] = _pad_rows(np.split(rows[:-1], np.cumsum(lengths)[:-1]), 2)
        arrays["past_events"] = _pad_rows([entry["past_events"] for entry in entries], 2)
        arrays["past_mask"] = np.arange(arrays["past_rows"].shape[1]) < lengths[:, None]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of windows of similar length, each with about `targets_per_batch` interactions.

    The order depends on the seed and the epoch alone, so a resumed run sees the batches it would have seen.
    """

    def __init__(self, lengths: NDArray[np.int64], targets_per_batch: int, seed: int, *, multiple: int = 1) -> None:
        """Keep the lengths; `set_epoch` chooses the order.

        Args:
            lengths: int64 ``[n]``, interactions of each window.
            targets_per_batch: interactions of a batch at most, padding included; a longer window is a batch by itself.
            seed: of the order.
            multiple: batches that a step takes together, of all processes. An epoch has a multiple of it, for which
                some batches are halved; otherwise its last step would be smaller, or show some windows twice.
        """
        self.lengths = lengths
        self.targets_per_batch = targets_per_batch
        self.seed = seed
        self.multiple = multiple
        self.epoch = 0
        # What accelerate reads to share batches among processes: their size varies, and none is left out.
        self.batch_size = None
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch, the same in each."""
        return len(self._cuts(np.sort(self.lengths))) - 1

    def _cuts(self, sorted_lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where batches begin, and the end, such that rows x longest row stays within the budget."""
        cuts, start = [0], 0
        for i, length in enumerate(sorted_lengths.tolist()):
            if i > start and (i - start + 1) * length > self.targets_per_batch:
                cuts.append(i)
                start = i
        cuts.append(len(sorted_lengths))
        while (len(cuts) - 1) % self.multiple:
            rows = np.diff(cuts)
            most = int(rows.argmax())
            if rows[most] < 2:
                break  # as many batches as windows: accelerate repeats some
            cuts.insert(most + 1, cuts[most] + int(rows[most]) // 2)
        return np.asarray(cuts, np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of each batch: ties among equal lengths and the order of batches are shuffled."""
        rng = np.random.default_rng((self.seed, self.epoch))
        shuffled = rng.permutation(len(self.lengths))
        by_length = shuffled[np.argsort(self.lengths[shuffled], kind="stable")]
        cuts = self._cuts(self.lengths[by_length])
        for batch in rng.permutation(len(cuts) - 1):
            yield by_length[cuts[batch] : cuts[batch + 1]].tolist()
