"""Baselines that only count: popularity, last-item Markov, popularity per query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from genretrieval.errors import InvalidInputError
from genretrieval.histories import Histories, LeaveOneOut
from genretrieval_pipelines.baselines.ranking import Baseline, Scores, fitted_items
from genretrieval_pipelines.cases import NO_USER, Cases

Transitions = Literal["training", "training + validation"]


class Popularity(Baseline):
    """Every case gets the items with the most interactions in the fitted part."""

    name = "popularity"

    def __init__(self, counts: NDArray[np.int64]) -> None:
        """Takes int64 ``[n_items]`` interactions of each item."""
        self.counts = counts
        self.n_items = len(counts)

    @classmethod
    def fit(cls, histories: Histories, ends: NDArray[np.int64], n_items: int) -> Popularity:
        """Count the interactions before `ends`, normally ``LeaveOneOut(histories).train_ends()``."""
        return cls(np.bincount(histories.items[fitted_items(histories, ends)], minlength=n_items))

    def backoff(self) -> NDArray[np.float32]:
        """float32 ``[n_items]`` in ``[0, 1)``, in popularity order: added to counts it only breaks ties."""
        return np.asarray(self.counts / (self.counts.max(initial=0) + 1), np.float32)

    def scores(self, histories: Histories, cases: Cases) -> Scores:
        """The same counts for every case."""
        return np.tile(self.counts.astype(np.float32), (len(cases), 1))


class Markov(Baseline):
    """What most often followed the last item; popularity orders ties, unseen items and empty histories."""

    def __init__(
        self, transitions: csr_array, popularity: Popularity, seen: Transitions, ends: NDArray[np.int64]
    ) -> None:
        """Takes counts ``[n_items, n_items]`` (from, to), the part of the log they saw, its end by user."""
        self.name = f"last-item Markov ({seen} transitions)"
        self.transitions = transitions
        self.ends = ends
        self.popularity = popularity
        self.n_items = popularity.n_items

    @classmethod
    def fit(cls, histories: Histories, n_items: int, *, transitions: Transitions) -> Markov:
        """Count the pairs of neighbours in each user's history.

        Args:
            histories: all users.
            n_items: items of the catalogue.
            transitions: how far to read. "training" is what a trained model has seen; the other choice also
                counts the step into the validation item: fair for test only, and worth a tenth of
                Recall@10, so it is part of the row's name.
        """
        ends = LeaveOneOut(histories).train_ends()
        if transitions == "training + validation":
            ends = np.where(ends < histories.offsets[1:], ends + 1, ends)
        fitted = fitted_items(histories, ends)
        fitted[histories.offsets[:-1][histories.lengths() > 0]] = False  # nothing leads to a first interaction
        to = np.flatnonzero(fitted)
        pairs = (histories.items[to - 1], histories.items[to])
        # csr_array sums what stands on the same place.
        counts = csr_array((np.ones(len(to), np.float32), pairs), shape=(n_items, n_items))
        return cls(counts, Popularity.fit(histories, ends, n_items), transitions, ends)

    def scores(self, histories: Histories, cases: Cases) -> Scores:
        """Transition counts from the last item, plus less than one for popularity.

        Raises:
            InvalidInputError: if the fitted part holds the target of a case, as validation transitions do on
                the validation split.
        """
        users = cases.user_rows != NO_USER
        if (self.ends[cases.user_rows[users]] > cases.ends[users]).any():
            raise InvalidInputError(
                f"{self.name} has counted the very targets of these cases; for validation fit 'training' transitions"
            )
        scores = np.tile(self.popularity.backoff(), (len(cases), 1))
        known = np.flatnonzero(cases.ends > cases.starts)
        scores[known] += self.transitions[histories.items[cases.ends[known] - 1]].toarray()
        return scores


class PopularityPerQuery(Baseline):
    """How often an item was chosen under exactly this query; popularity orders ties and unknown queries."""

    name = "popularity per query"

    def __init__(self, query_rows: dict[str, int], counts: csr_array, popularity: Popularity) -> None:
        """Takes counts ``[n_queries, n_items]`` and the row of each query."""
        self.query_rows = query_rows
        self.counts = counts
        self.popularity = popularity
        self.n_items = popularity.n_items

    @classmethod
    def fit(cls, queries: Sequence[str], items: NDArray[np.int32], n_items: int) -> PopularityPerQuery:
        """Count training pairs: item ``items[i]`` was chosen under ``queries[i]``."""
        query_rows = {query: row for row, query in enumerate(dict.fromkeys(queries))}
        rows = np.fromiter((query_rows[query] for query in queries), np.int64, len(queries))
        counts = csr_array((np.ones(len(items), np.float32), (rows, items)), shape=(len(query_rows), n_items))
        return cls(query_rows, counts, Popularity(np.bincount(items, minlength=n_items)))

    def scores(self, histories: Histories, cases: Cases) -> Scores:
        """Counts under the case's query, plus less than one for popularity."""
        scores = np.tile(self.popularity.backoff(), (len(cases), 1))
        rows = [(i, self.query_rows[q]) for i, q in enumerate(cases.queries) if q in self.query_rows]
        if rows:
            at, row = np.array(rows).T
            scores[at] += self.counts[row].toarray()
        return scores


def training_queries(histories: Histories, ends: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int32]]:
    """The (query, item row) pairs before `ends`, as `PopularityPerQuery.fit` takes them."""
    rows = np.flatnonzero(fitted_items(histories, ends) & (histories.query_rows >= 0))
    return [histories.queries[row] for row in histories.query_rows[rows]], histories.items[rows]
