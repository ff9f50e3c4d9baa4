"""What every baseline is: something that scores all items of the catalogue for a case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import InvalidInputError
from genretrieval.histories import Histories
from genretrieval.metrics import NOTHING
from genretrieval_pipelines.cases import Cases

Ranked = NDArray[np.int32]
Scores = NDArray[np.float32]

CHUNK = 512  # cases scored at once: bounds memory at CHUNK x n_items floats


class Baseline(ABC):
    """A fitted ranking rule over item rows ``0 .. n_items - 1``.

    Attributes:
        name: what the quality table prints; says what the rule was fitted on where that is a choice.
        n_items: items of the catalogue.
    """

    name: str
    n_items: int

    @abstractmethod
    def scores(self, histories: Histories, cases: Cases) -> Scores:
        """Score every item for every case; higher is better, ``-inf`` means "never return".

        Args:
            histories: the arrays that `cases` points into.
            cases: few enough that ``[len(cases), n_items]`` floats fit in memory; `rank` sees to that.

        Returns:
            float32 ``[n_cases, n_items]``, the caller's to overwrite.
        """

    def rank(self, histories: Histories, cases: Cases, k: int, *, exclude_seen: bool) -> Ranked:
        """The `k` best items of each case.

        Args:
            histories: the arrays that `cases` points into.
            cases: requests to answer.
            k: length of a list.
            exclude_seen: leave out the items of the case's own history.

        Returns:
            int32 ``[n_cases, k]``, best first, `NOTHING` where the rule has no more; ties: lower row first.
        """
        lists = [np.empty((0, k), np.int32)]
        for rows in _chunks(len(cases)):
            part = cases.take(rows)
            scores = self.scores(histories, part)
            if exclude_seen:
                seen_by, seen = history_items(histories, part)
                scores[seen_by, seen] = -np.inf
            lists.append(top_items(scores, k))
        return np.concatenate(lists)


def _chunks(n: int) -> Iterator[NDArray[np.int64]]:
    """Case rows 0 .. n - 1, `CHUNK` at a time."""
    for first in range(0, n, CHUNK):
        yield np.arange(first, min(first + CHUNK, n), dtype=np.int64)


def history_items(histories: Histories, cases: Cases) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Every (case row, item row) of the cases' histories, as two int arrays of the same length."""
    lengths = cases.ends - cases.starts
    rows = np.repeat(np.arange(len(cases), dtype=np.int64), lengths)
    within = np.arange(len(rows), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return rows, histories.items[cases.starts[rows] + within]


def top_items(scores: Scores, k: int) -> Ranked:
    """The `k` best columns of each row, best first; ``-inf`` is never returned; ties: lower column first.

    Args:
        scores: float32 ``[n_cases, n_items]`` without NaN.
        k: length of a list, at least 1.

    Returns:
        int32 ``[n_cases, k]``, filled up with `NOTHING`.

    Raises:
        InvalidInputError: if `k` is below 1.
    """
    if k < 1:
        raise InvalidInputError(f"k is {k}; a list needs at least one place")
    # Score and column in one integer make every key unique, so that a partial sort settles ties as well.
    # IEEE floats order like integers once the lower bits of negative ones are flipped; + 0.0 removes -0.0.
    bits = (scores + np.float32(0.0)).view(np.int32)
    ordered = (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).astype(np.int64)
    n_items = scores.shape[1]
    keys = ordered << 32 | (n_items - 1 - np.arange(n_items, dtype=np.int64))
    kept = min(k, n_items)
    best = np.sort(np.partition(keys, n_items - kept, axis=1)[:, n_items - kept :], axis=1)[:, ::-1]
    items = (n_items - 1 - (best & 0xFFFFFFFF)).astype(np.int32)
    found = np.take_along_axis(scores, items, axis=1) > -np.inf
    ranked = np.full((len(scores), k), NOTHING, np.int32)
    ranked[:, :kept] = np.where(found, items, NOTHING)
    return ranked


def fitted_items(histories: Histories, ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask over the flat arrays: interactions that lie before their user's end in `ends` (bool ``[n]``)."""
    positions = np.arange(len(histories.items), dtype=np.int64)
    return positions < np.repeat(ends, histories.lengths())
